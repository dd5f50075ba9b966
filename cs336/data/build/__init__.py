"""From a recipe to shards: units of work over processes or a cluster, deduplication, tokens."""
