"""Run directories, read back as self-contained HTML pages: one run, or several compared; and builds of data."""

from cs336.report.ablation import write_ablation_report
from cs336.report.batch_size import write_batch_size_report
from cs336.report.build import write_build_report
from cs336.report.comparison import write_comparison
from cs336.report.page import write_report
from cs336.report.study import write_study_report

__all__ = [
    "write_ablation_report",
    "write_batch_size_report",
    "write_build_report",
    "write_comparison",
    "write_report",
    "write_study_report",
]
