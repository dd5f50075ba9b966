"""A file a verb: its configuration, and what a step of it does."""
