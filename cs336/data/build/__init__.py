"""From a recipe to shards: units of work over processes or a cluster, deduplication, tokens."""

from cs336.data.build.build import Build as Build
from cs336.data.build.build import build as build
