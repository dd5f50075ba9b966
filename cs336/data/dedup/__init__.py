"""Duplicates: equal lines, paragraphs, passages, documents; near duplicates; texts of one meaning; a Bloom filter."""
