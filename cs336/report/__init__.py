"""A run directory, read back as one self-contained HTML page."""

from cs336.report.page import write_report

__all__ = ["write_report"]
