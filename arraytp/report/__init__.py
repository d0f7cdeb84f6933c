"""Tables and figures that compare runs, made from result folders only, never from a live run."""

from arraytp.report.figures import write_comparison, write_figures
from arraytp.report.reading import Result, read_result, read_results
from arraytp.report.studies import write_study
from arraytp.report.tables import comparison_table

__all__ = [
    "Result",
    "comparison_table",
    "read_result",
    "read_results",
    "write_comparison",
    "write_figures",
    "write_study",
]
