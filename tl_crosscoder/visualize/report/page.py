"""`ReportData` and figures as one HTML file.

Contract: a pure function of what was collected; every text is escaped by jinja or stands as JSON
without `<`; plotly and circuitsvis are in the page once, packed, and unpacked when a figure comes
into view. Limit: figures and texts need a browser of 2023 or later (`DecompressionStream`).
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
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from tl_crosscoder import html_tables
from tl_crosscoder.html_results import UNRANKED
from tl_crosscoder.interventions.causal_result import CausalRow
from tl_crosscoder.visualize.circuits_html import circuits_script, script_json
from tl_crosscoder.visualize.report.causes import Recovered
from tl_crosscoder.visualize.report.data import ReportData
from tl_crosscoder.visualize.report.glossary import GLOSSARY, limits
from tl_crosscoder.visualize.report.prompts import N_CANDIDATES
from tl_crosscoder.visualize.terminal import meant_sites, spoken

_SCRIPTS = ("elements", "table", "latent", "lazy", "main")
_ORDERS = {
    "score": "the share of the difference that each says alone, times R",
    "relative_decoder_norm": "R",
    "difference": "the share of the difference that each says alone",
    "nu": "the ranks of |nu|",
    "activity": "how many tokens they are active on",
}


def page(data: ReportData, figures: Mapping[str, go.Figure]) -> str:
    """The document.

    Args:
        data: what it says.
        figures: by name, in the order of the page.
    """
    environment = Environment(
        loader=PackageLoader("tl_crosscoder.visualize.report"), autoescape=True, trim_blocks=True
    )
    environment.filters |= {
        "percent": _percent, "interval": _interval, "columns": _columns, "command": _command,
        "spoken": spoken,
    }  # fmt: skip
    terms = {key: asdict(term) for key, term in GLOSSARY.items()}
    content = data.page_data() | {"terms": terms, "compared": data.compared}
    drawn = {name: json.loads(figure.to_json() or "{}") for name, figure in figures.items()}
    return environment.get_template("page.html").render(
        data=data,
        order=_ORDERS.get(data.order, data.order),
        classes=[name for name, count, _ in data.dictionary.classes if count],
        roles=sorted({record.main_role for record in data.latents}),
        figures={name: figure["layout"].get("height", 450) for name, figure in drawn.items()},
        said_compared=meant_sites(data.compared),
        unranked=UNRANKED,
        glossary=GLOSSARY,
        limits=limits(data),
        n_candidates=N_CANDIDATES,
        version=version("tl-crosscoder"),
        css=Markup(_template("style.css")),
        js=Markup("\n".join(_template(f"{name}.js") for name in _SCRIPTS)),
        page_json=Markup(script_json(content)),
        figures_json=Markup(script_json(drawn)),
        plotly=Markup(_packed_plotly() if drawn else ""),
        circuits=Markup(circuits_script() if data.texts else ""),
    )


@cache
def _packed_plotly() -> str:
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def _template(name: str) -> str:
    folder = resources.files("tl_crosscoder.visualize.report") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _percent(value: float | None, digits: int = 1) -> str:
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return f"{_rounded(value, digits)}\N{NO-BREAK SPACE}%"


def _rounded(value: float, digits: int = 0) -> str:
    """In percent, without the sign of a zero."""
    return f"{round(100 * value, digits) + 0.0:.{digits}f}"


def _interval(row: Recovered | CausalRow) -> str:
    if math.isnan(row.share_low) or math.isnan(row.share_high):
        return ""
    return f"[{_rounded(row.share_low)}, {_rounded(row.share_high)}]"


def _columns(columns: Mapping[str, list[Any]]) -> Markup:
    return html_tables.table(columns)


def _command(text: str) -> Markup:
    """Text with what stands between backticks as code."""
    parts = re.split(r"`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts)
    )
