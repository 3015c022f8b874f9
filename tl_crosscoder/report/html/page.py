"""`report`: one HTML file about a run, to open without a network and to send to others.

Contract: the file holds everything it shows, and asks for nothing; text is escaped by jinja or
stands as packed JSON; plotly and circuitsvis are in the page once, packed, and unpacked when a
figure comes into view. Limit: latents, figures and texts need a browser of 2023 or later
(`DecompressionStream`).
"""

import base64
import gzip
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from tl_crosscoder import files
from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS, UNRANKED
from tl_crosscoder.report.circuits import circuits_script, script_json
from tl_crosscoder.report.figures import run_figures
from tl_crosscoder.report.html.data import ReportData, ReportSettings, collect
from tl_crosscoder.report.html.samples import N_CANDIDATES
from tl_crosscoder.results.measures import DIRECTIONS, MEASURES, ORDERS, spoken
from tl_crosscoder.results.render import NONE, table_html
from tl_crosscoder.run.run import Run

_SCRIPTS = ("elements", "table", "latent", "lazy", "main")
_GLOSSARY = (
    "change_share",
    "d_sae", "fve", "difference_fve", "difference_share", "l0", "dead_share", "latent_class",
    "relative_decoder_norm", "delta_norm", "decoder_norm", "decoder_cosine", "encoder_cosine",
    "attribution", "attribution_share", "score",
    "explained_difference", "explained_difference_drop", "nu_error", "nu_reconstruction",
    "is_specific", "n_active", "active_share", "template_share", "main_role", "code", "quantile",
    "logit", "kl", "recovery", "necessity", "insert", "steer", "ceiling", "of_reachable",
    "strongest", "control_mean", "p_control_holm", "flag", "off_target_kl", "off_target_ce",
    "random_mean", "strength", "ablation", "interval",
)  # fmt: skip
"""Measures that the page explains."""


def report(
    run: Run | str | Path,
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
    run = run if isinstance(run, Run) else Run(path=files.user_path(run))
    path = run.path / files.REPORT_NAME if output is None else files.user_path(output)
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"{path} must end in .html: that is what a report is.")
    data = collect(run, settings, show_progress=show_progress)
    files.write_text(path, page(data, run_figures(run)))
    return path


def page(data: ReportData, figures: Mapping[str, go.Figure], *, is_live: bool = False) -> str:
    """The document; figures by name, in the order of the page; a live one asks its server."""
    environment = Environment(
        loader=PackageLoader("tl_crosscoder.report.html"), autoescape=True, trim_blocks=True
    )
    environment.filters |= {
        "percent": _percent, "columns": table_html, "command": _command, "spoken": spoken,
    }  # fmt: skip
    terms = {name: MEASURES[name] for name in _GLOSSARY}
    shown = {name: asdict(term) | {"label": term.label} for name, term in terms.items()}
    scripts = (*_SCRIPTS, "live") if is_live else _SCRIPTS
    content = {"terms": shown, "compared": data.compared, "directions": DIRECTIONS}
    drawn = {name: json.loads(figure.to_json() or "{}") for name, figure in figures.items()}
    return environment.get_template("page.html").render(
        data=data,
        order=ORDERS.get(data.order, data.order),
        classes=[name for name, count in data.dictionary["classes"] if count],
        roles=sorted({record["main_role"] for record in data.latents}),
        figures={name: figure["layout"].get("height", 450) for name, figure in drawn.items()},
        unranked=UNRANKED,
        glossary=terms,
        interval=_interval,
        limits=_limits(data),
        n_candidates=N_CANDIDATES,
        version=version("tl-crosscoder"),
        css=Markup(_template("style.css")),
        is_live=is_live,
        js=Markup("\n".join(map(_template, (f"{name}.js" for name in scripts)))),
        page_data=Markup(_packed(script_json(content | data.page_data()))),
        figures_json=Markup(script_json(drawn)),
        plotly=Markup(_packed_plotly() if drawn else ""),
        circuits=Markup(circuits_script() if data.texts else ""),
    )


@cache
def _packed_plotly() -> str:
    # Plotly reads its megabytes when it is imported, which a report without figures does not need.
    from plotly.offline import get_plotlyjs

    return _packed(get_plotlyjs())


def _packed(text: str) -> str:
    """Text that `unpacked` of the page's script reads."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _template(name: str) -> str:
    folder = resources.files("tl_crosscoder.report.html") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _percent(value: float | None, digits: int = 1) -> str:
    if value is None or math.isnan(value):
        return NONE
    return f"{_rounded(value, digits)}\N{NO-BREAK SPACE}%"


def _rounded(value: float, digits: int = 0) -> str:
    """Percent, without the sign of a zero."""
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"


def _interval(low: float, high: float) -> str:
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"[{_rounded(low)}, {_rounded(high)}]"


def _command(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    parts = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )


def _limits(data: ReportData) -> dict[str, str]:
    """Limits of the numbers: what they do not show, and why."""
    shown = f"{len(data.latents):,} of {data.dictionary['d_sae']:,} latents"
    limits = {
        f"Only {shown} are here": f"The first by {ORDERS.get(data.order, data.order)}; latents "
        f"active on fewer than {MIN_ACTIVE_TOKENS} held-out tokens are not ranked. `tl-crosscoder "
        "analyze --latent J` shows any of them.",
        "Measures are not causes": "Norms, scaling and the explained difference suggest which "
        "latents to test. Whether they cause what the fine-tune does is in the section on causes, "
        "if it was tested.",
        "Rates and examples are of one text": f"{data.dictionary['n_tokens']:,} held-out tokens "
        "from the same sources as the training text. A latent that is never active here may be "
        "active elsewhere.",
        "One dictionary of one seed": "Another seed gives other latents. `tl-crosscoder analyze "
        "--seeds` tells how many of these are found again.",
        "One hook point": "What the fine-tune does in the layers above the hook is in no latent "
        "and no patch.",
        "The effect on the logits is direct": "Layers between the hook and the unembedding are "
        "skipped; far from the last layer the effect means little.",
    }
    if data.samples is not None:
        limits["Samples are anecdotes"] = (
            f"Greedy, and after few prompts: of up to {N_CANDIDATES} held-out ones, first those "
            "after which the two models differ. They show what can happen, not how often."
        )
    if data.causes.sections:
        limits["A p-value has a floor"] = (
            "With n random controls it is 1 / (n + 1) or more; sets were chosen by a ranking on "
            "the same kind of text, not on the prompts of the test."
        )
    return limits
