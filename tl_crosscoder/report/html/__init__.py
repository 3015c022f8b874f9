"""The report: one HTML file about a run, to open without a network and to send to others.

`data` collects what is shown, `latents` and `samples` make its parts, `page` writes the file.
"""

from tl_crosscoder.report.html.data import ReportSettings
from tl_crosscoder.report.html.page import report
from tl_crosscoder.report.html.samples import SampleSettings

__all__ = ["ReportSettings", "SampleSettings", "report"]
