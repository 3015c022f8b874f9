"""`report`: one HTML file about a run, to open without a network and to send to others.

Contract: the file holds everything it shows, and asks for nothing. Measures, examples and tests are
those in the run's folder; the models are loaded once, for what they say to the logits and what they
write. Limit: of 200 latents about 5 MB; more latents make a larger file.
"""

from pathlib import Path

from tl_crosscoder import files
from tl_crosscoder.run_folder import RunFolder
from tl_crosscoder.visualize.figures import run_figures
from tl_crosscoder.visualize.report.data import collect
from tl_crosscoder.visualize.report.models import ReportSettings
from tl_crosscoder.visualize.report.page import page

REPORT_NAME = "report.html"


def report(
    run: RunFolder | str | Path,
    *,
    settings: ReportSettings | None = None,
    output: str | Path | None = None,
    show_progress: bool = False,
) -> Path:
    """Write the report of a run.

    Args:
        run: its folder.
        settings: how many latents, and what the models are asked for.
        output: the file; None is `report.html` in the folder.
        show_progress: with progress bars.

    Returns:
        The file's path.

    Raises:
        ValueError: models that cannot be loaded, prompts that are too long, or an output that does
            not end in `.html`.
        FileNotFoundError: no run, no measures, or samples without a text.
    """
    run = run if isinstance(run, RunFolder) else RunFolder(path=Path(run))
    path = run.path / REPORT_NAME if output is None else Path(output)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"{path} must end in .html: that is what a report is.")
    data = collect(run, settings, show_progress=show_progress)
    files.write_text(path, page(data, run_figures(run)))
    return path
