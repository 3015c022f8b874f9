"""The report: one HTML file about a run, to open without a network and to send to others.

From the top: `data` collects what is shown, `page` makes it HTML, `writing` writes the file.
"""

from tl_crosscoder.report.html.models import ReportSettings
from tl_crosscoder.report.html.page import report
from tl_crosscoder.report.html.prompts import SampleSettings

__all__ = ["ReportSettings", "SampleSettings", "report"]
