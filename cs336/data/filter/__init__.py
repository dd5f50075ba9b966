"""What to keep: language, personal data, quality rules."""
