"""The report: one HTML file about a run, to open without a network and to send to others.

From the top: `data` collects what is shown, `page` makes it HTML, `writing` writes the file.
"""

from tl_crosscoder.visualize.report.models import ReportSettings
from tl_crosscoder.visualize.report.samples import SampleSettings
from tl_crosscoder.visualize.report.writing import report

__all__ = ["ReportSettings", "SampleSettings", "report"]
