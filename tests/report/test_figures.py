"""The look of figures, and those of a measurement."""

import base64
import html
import math
import re
from dataclasses import replace
from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
from analysis.hand_made import latent_measures, measurement

from tl_crosscoder.analysis.latent_scaling import LatentScaling
from tl_crosscoder.report.figures import (
    NothingToDraw,
    delta_norm_map,
    latent_scaling_map,
    relative_norm_histogram,
    save_figure,
    shared_cosine_histogram,
)
from tl_crosscoder.report.figures.latents import N_BINS, N_DRAWN
from tl_crosscoder.report.figures.style import COLOURS, GREY, SCALE, TEXT, lines

NAN = math.nan


def words(figure: go.Figure) -> str:
    """Title and notes of a figure as plain text."""
    text = re.sub("<[^>]*>", " ", figure.layout.title.text)
    return html.unescape(" ".join(text.split()))


def histogram(relative_norms, n_active=None) -> go.Figure:
    norms = torch.as_tensor(relative_norms)
    latents = latent_measures((1 - norms).tolist(), norms.tolist(), n_active or [1] * len(norms))
    return relative_norm_histogram(measurement(latents, examples={}))


def counts(figure) -> dict[int, int]:
    """Latents by bin, where there are any."""
    return {i: n for i, n in enumerate(figure.data[0].y) if n}


# --- histograms -----------------------------------------------------------------------------------


def test_bins_are_those_of_a_count_by_hand():
    # 51 bins: 0 and 0.01 < 1/51 are in the first, 0.5 and 0.505 in the middle one (25/51 = 0.490
    # to 26/51 = 0.510), 0.99 > 50/51 and 1 in the last. The dead latent and NaN (norms 0) are not.
    norms = [0.0, 0.01, 0.5, 0.505, 0.99, 1.0, 0.7]
    figure = histogram(norms, [1, 1, 1, 1, 1, 1, 0])
    assert counts(figure) == {0: 2, 25: 2, 50: 2}
    assert words(figure).startswith("Relative decoder norm of 6 active latents")
    bars = histogram([0.31]).data[0]
    (i,) = [i for i, n in enumerate(bars.y) if n]
    assert abs(bars.x[i] - 0.31) <= bars.width / 2
    assert (bars.width, len(bars.x), len(bars.y)) == (1 / N_BINS, N_BINS, N_BINS)
    latents = latent_measures([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [5, 5, 5])
    without_norm = relative_norm_histogram(measurement(latents, examples={}))
    assert sum(counts(without_norm).values()) == 2
    assert "of 2 active" in words(without_norm)


def test_axes_have_titles_and_the_number_of_latents_is_on_a_log_axis():
    layout = histogram([0.5]).layout
    assert layout.xaxis.title.text.startswith("R = ")
    assert layout.yaxis.title.text == "number of latents"
    assert (layout.xaxis.type, layout.yaxis.type) == (None, "log")
    labels = {a.text: a.x for a in layout.annotations}
    assert labels == {"base only": 0.0, "shared": 0.5, "fine-tuned only": 1.0}


def test_cosine_is_of_shared_active_latents():
    # Delta-norm 0.5 of the first three; the fourth is finetuned-only, the second dead.
    latents = latent_measures([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [5, 0, 5, 5])
    # 51 bins of [0, 1]: 0.5 is 25.5, 1 the last. With one below 0 the bins are of [-1, 1]: -0.5
    # is 12.75, 0.5 is 38.25.
    for third, expected in ((1.0, {25: 1, 50: 1}), (-0.5, {12: 1, 38: 1})):
        latents = replace(latents, decoder_cosine=torch.tensor([0.5, 0.1, third, 0.2]))
        figure = shared_cosine_histogram(measurement(latents, examples={}))
        assert counts(figure) == expected
        assert words(figure).startswith("Decoder cosine of 2 shared active latents")


# --- the look -------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("page", ["#ffffff", "#111111"])
def test_colours_are_seen_on_white_and_on_black(page):
    def contrast(colour: str) -> float:
        low, high = sorted((luminance(colour), luminance(page)))
        return (high + 0.05) / (low + 0.05)

    assert contrast(TEXT) > 4.3
    assert min(map(contrast, (*COLOURS, GREY))) > 3
    # Cells of a map are areas and lie side by side: the faintest may be fainter.
    assert min(contrast(colour) for _, colour in SCALE) > 2


def test_text_is_wrapped_and_shown_as_it_is():
    assert lines("a <b>bold</b> name & \u202emore", 12) == [
        "a", "&lt;b&gt;bold&lt;/b&gt;", "name &amp; \\u202emore",
    ]  # fmt: skip


# --- maps -----------------------------------------------------------------------------------------


def scaled(
    nu_error: list[float],
    nu_reconstruction: list[float],
    *,
    base: list[float] | None = None,
    n_active: list[int] | None = None,
    ranked: tuple[int, ...] = (),
):
    """A measurement of latents with these nu; all finetuned norms are 1."""
    n = len(nu_error)
    active = n_active or [5] * n
    latents = latent_measures(base or [1.0] * n, [1.0] * n, active)
    ones = torch.ones(n).double()
    betas = [torch.stack([torch.tensor(nu).double(), ones]) for nu in (nu_error, nu_reconstruction)]
    table = LatentScaling(
        direction="finetuned",
        beta_error=betas[0],
        beta_reconstruction=betas[1],
        beta_activation=betas[0],
        beta_activation_no_bias=betas[0],
        n_active=torch.tensor(active).double(),
    )
    latents = replace(latents, scaling={"finetuned": table})
    return measurement(latents, examples={j: [] for j in ranked})


def cells(heatmap: go.Heatmap) -> dict[tuple[int, int], int]:
    """Latents by column and row, where there are any."""
    return {(i, j): n for j, row in enumerate(heatmap.customdata) for i, n in enumerate(row) if n}


def test_cells_of_a_map_are_those_of_a_count_by_hand():
    # Bins of 2/51 from -0.5: 0.1 is (0.6 / 2) 51 = 15.3, 1.0 is 38.25, -0.5 is 0; 7 and infinity
    # are in the last bin, 50. Latent 3 has no value and latent 4 is dead.
    found = scaled([0.1, 0.1, 7.0, NAN, 0.1, 1.0], [1.0, 1.0, -0.5, 1.0, 1.0, math.inf],
                   n_active=[5, 5, 5, 5, 0, 5])  # fmt: skip
    figure = latent_scaling_map(found)
    (heatmap,) = figure.data
    assert cells(heatmap) == {(15, 38): 2, (50, 0): 1, (38, 50): 1}
    assert heatmap.z[38][15] == 0.3  # log10 2
    assert (heatmap.z[0][50], heatmap.z[0][0]) == (0.0, None)
    assert abs(heatmap.x0 + 15 * heatmap.dx - 0.1) <= heatmap.dx / 2
    assert words(figure).startswith("Latent Scaling of 5 active latents")
    said = "2 values beyond -0.5 or 1.5 are at the border. 1 latents without a value"
    assert said in words(figure)


def test_specific_latents_are_counted_and_ranked_and_exclusive_ones_are_points():
    # |nu_error| < 0.2 and |nu_reconstruction| < 0.5: latents 0 and 1, of which 1 is dead.
    found = scaled(
        [0.1, -0.1, 0.3, 0.1, 9.0],
        [0.4, 0.0, 0.0, 0.6, 0.1],
        base=[1.0, 1.0, 0.02, 0.0, 1.0],
        n_active=[5, 0, 6, 7, 8],
        ranked=(4,),
    )
    figure = latent_scaling_map(found)
    assert "< 0.5 (1 latents)." in words(figure)
    points = {trace.name: trace for trace in figure.data[1:]}
    assert [*points] == ["fine-tuned only (2)", "first of the ranking (1)"]
    only = points["fine-tuned only (2)"]
    assert (only.x, only.y) == ((0.1, 0.3), (0.6, 0.0))  # the more active first
    assert only.hovertext[1] == (
        "latent: 2<br>class: finetuned-only<br>nu error: 0.30<br>nu reconstruction: 0.00<br>"
        "Delta-norm: 0.990<br>cosine: +1.00<br>active tokens: 6"
    )
    assert points["first of the ranking (1)"].x == (1.5,)
    assert "nu error: 9.00" in points["first of the ranking (1)"].hovertext[0]
    many = latent_scaling_map(scaled([0.1] * 300, [0.1] * 300, base=[0.0] * 300)).data[1]
    assert (len(many.x), many.name) == (N_DRAWN, "fine-tuned only (100 of 300)")


def test_delta_norm_map_has_a_panel_for_each_nu_and_their_correlation():
    # Norms 1 and base 1, 0.5, 0: Delta-norm (1 + (1 - b)) / 2 = 0.5, 0.75, 1. nu_error 1, 0.5, 0
    # is 2 - 2 Delta-norm, r = -1; nu_reconstruction is Delta-norm, r = 1. The last is beyond.
    figure = delta_norm_map(
        scaled([1.0, 0.5, 0.0, 40.0], [0.5, 0.75, 1.0, 40.0], base=[1.0, 0.5, 0.0, 1.0])
    )
    heatmaps = [trace for trace in figure.data if trace.type == "heatmap"]
    # Columns of 1/51: 0.5 is 25.5, 0.75 is 38.25, 1 the last. Rows of 2/51 from -0.5: 0 is 12.75,
    # 0.5 is 25.5, 0.75 is 31.875, 1 is 38.25.
    assert cells(heatmaps[0]) == {(25, 38): 1, (38, 25): 1, (50, 12): 1, (25, 50): 1}
    assert cells(heatmaps[1]) == {(25, 25): 1, (38, 31): 1, (50, 38): 1, (25, 50): 1}
    assert "within the axes: error -1.00, reconstruction 1.00." in words(figure)
    assert [t.name for t in figure.data if t.showlegend] == ["fine-tuned only (1)"]


EVERY = (relative_norm_histogram, shared_cosine_histogram, latent_scaling_map, delta_norm_map)
every_figure = pytest.mark.parametrize("draw", EVERY)


@every_figure
def test_a_figure_of_many_latents_is_as_small_as_one_of_few(draw):
    def size(n: int) -> int:
        generator = torch.Generator().manual_seed(0)
        nu = (1 + 0.2 * torch.randn(2, n, generator=generator)).tolist()
        base = torch.rand(n, generator=generator).tolist()
        base[: n // 4] = [0.0] * (n // 4)
        return len(draw(scaled(*nu, base=base, ranked=(1, 2, 3))).to_json())

    small, large = size(1024), size(10_000)
    assert large < 1.3 * small
    assert large < 150_000


@every_figure
def test_what_there_is_not_to_draw_is_said(draw):
    figure = draw(scaled([0.1, 0.1], [0.1, 0.1], n_active=[0, 0]))
    assert re.search(r"of 0 (shared )?active latents", words(figure))
    figure.to_json()
    with pytest.raises(NothingToDraw, match="single site"):
        draw(replace(scaled([0.1], [0.1]), compared=None))
    # Sites of unequal width have neither angle nor nu.
    latents = latent_measures([1.0, 1.0], [1.0, 1.0], [5, 5])
    latents = replace(latents, decoder_cosine=torch.full((2,), NAN))
    if draw is not relative_norm_histogram:
        with pytest.raises(ValueError, match="differ in width"):
            draw(measurement(latents, examples={}))


@every_figure
def test_names_of_sites_are_text(draw):
    found = replace(scaled([0.1], [0.1], base=[0.0]), compared=("<i>old</i>", "<b>new</b>"))
    shown = draw(found).to_plotly_json()
    assert "<i>" not in str(shown)
    assert "<b>new" not in str(shown)
    assert "&amp;lt;" not in str(shown)  # once, not twice


HOSTILE = "</script><img src=x onerror=fail()>"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("figure") / "new folder" / "figure.html"
    found = replace(scaled([0.1, 1.0], [0.1, 1.0], base=[0.0, 1.0]), compared=(HOSTILE, "new"))
    assert save_figure(relative_norm_histogram(found), path) == path
    return path


def test_a_saved_figure_is_a_page_of_its_own(saved):
    text = saved.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "Relative decoder norm of 2" in text
    assert len(text) > 1_000_000  # plotly.js itself
    assert HOSTILE not in text
    assert not re.search(r"<(script|link|img)\b[^>]*\b(src|href)=", text)


def test_figures_of_a_folder_share_their_script(tmp_path):
    figure = relative_norm_histogram(scaled([0.1, 1.0], [0.1, 1.0], base=[0.0, 1.0]))
    for name in ("one.html", "other.html"):
        save_figure(figure, tmp_path / name, shares_script=True)
        assert (tmp_path / name).stat().st_size < 50_000
        assert 'src="plotly.min.js"' in (tmp_path / name).read_text(encoding="utf-8")
    script = tmp_path / "plotly.min.js"
    written = script.stat().st_mtime_ns
    assert script.stat().st_size > 1_000_000
    save_figure(figure, tmp_path / "one.html", shares_script=True)
    assert script.stat().st_mtime_ns == written
    script.write_text("cut short")
    save_figure(figure, tmp_path / "one.html", shares_script=True)
    assert script.stat().st_size > 1_000_000


@pytest.mark.slow
def test_a_saved_figure_opens_without_a_network_and_without_errors(saved, browser):
    browser.open(saved)
    shown = browser.wait_for("document.querySelector('.main-svg .gtitle')?.textContent")
    assert shown.startswith("Relative decoder norm of 2")
    labels = browser.wait_for(
        "[...document.querySelectorAll('.annotation-text')].map(e => e.textContent)"
    )
    assert f"{HOSTILE} only" in labels
    assert browser.errors() == []
    assert browser.left_the_page() == []


@pytest.mark.slow
def test_in_a_notebook_a_figure_has_a_picture_beside_it(browser, monkeypatch):
    pytest.importorskip("kaleido")
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, **_: shown.append(bundle))
    monkeypatch.setattr("plotly.io.renderers.default", "plotly_mimetype")
    figure = relative_norm_histogram(scaled([0.1, 1.0], [0.1, 1.0], base=[0.0, 1.0]))
    figure._ipython_display_()
    (bundle,) = shown
    assert [*bundle] == ["application/vnd.plotly.v1+json", "image/png"]
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert figure.layout.paper_bgcolor is None
