"""What people read: the table in the terminal and the one-page HTML report."""

from memlm.evaluation.report.page import render_report
from memlm.evaluation.report.terminal import format_table

__all__ = ["format_table", "render_report"]
