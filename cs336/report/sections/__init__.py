"""The sections of a report, a file each; see cs336.report.section."""
