"""Duplicates: equal lines, equal documents, near duplicates; a Bloom filter."""
