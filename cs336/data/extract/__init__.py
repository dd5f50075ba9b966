"""Text out of pages and papers."""
