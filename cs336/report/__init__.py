"""Run directories, read back as self-contained HTML pages: one run, or several compared."""

from cs336.report.comparison import write_comparison
from cs336.report.page import write_report

__all__ = ["write_comparison", "write_report"]
