import re

import pytest
import torch
from analysis.hand_made import latent_measures, measurement

from tl_crosscoder import relative_norm_histogram
from tl_crosscoder.visualize.figures import N_BINS, save_figure


def histogram(relative_norms, n_active=None):
    norms = torch.as_tensor(relative_norms)
    latents = latent_measures((1 - norms).tolist(), norms.tolist(), n_active or [1] * len(norms))
    return relative_norm_histogram(measurement(latents, examples={}))


def counts(figure) -> list[int]:
    return [int(n or 0) for n in figure.data[0].y]


def random_norms(n):
    return torch.rand(n, generator=torch.Generator().manual_seed(0))


def test_every_living_latent_is_in_one_bin():
    norms = random_norms(999)
    n_active = [int(j % 3 > 0) for j in range(999)]
    figure = histogram(norms, n_active)
    assert sum(counts(figure)) == sum(n_active) == 666
    assert figure.layout.title.text == "Relative decoder norm of 666 living latents"


def test_bins_are_those_of_a_count_by_hand():
    # 51 bins: 0 and 0.01 < 1/51 are in the first, 0.5 and 0.505 in the middle one (25/51 = 0.490
    # to 26/51 = 0.510), 0.99 > 50/51 and 1 in the last.
    found = counts(histogram([0.0, 0.01, 0.5, 0.505, 0.99, 1.0]))
    assert {i: n for i, n in enumerate(found) if n} == {0: 2, 25: 2, 50: 2}


def test_bars_stand_over_their_bins():
    bars = histogram([0.31]).data[0]
    (i,) = [i for i, n in enumerate(bars.y) if n]
    assert abs(bars.x[i] - 0.31) <= bars.width / 2
    assert bars.width == 1 / N_BINS
    assert len(bars.x) == len(bars.y) == N_BINS


def test_a_latent_without_norm_is_left_out():
    latents = latent_measures([0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [5, 5, 5])
    figure = relative_norm_histogram(measurement(latents, examples={}))
    assert sum(counts(figure)) == 2
    assert "of 2 living" in figure.layout.title.text


def test_no_living_latents_give_an_empty_figure():
    assert counts(histogram([0.5, 0.6], [0, 0])) == [0] * N_BINS


def test_axes_have_titles_and_the_number_of_latents_is_on_a_log_axis():
    layout = histogram([0.5]).layout
    assert "relative decoder norm" in layout.xaxis.title.text
    assert layout.yaxis.title.text == "number of latents"
    assert layout.yaxis.type == "log"
    assert layout.xaxis.type != "log"
    labels = {a.text: a.x for a in layout.annotations}
    assert labels == {"base only": 0.0, "shared": 0.5, "fine-tuned only": 1.0}


def test_a_figure_of_many_latents_is_as_small_as_one_of_few():
    small, large = (len(histogram(random_norms(n)).to_json()) for n in (500, 70_000))
    assert large < 1.1 * small
    assert large < 20_000


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("figure") / "new folder" / "figure.html"
    assert save_figure(histogram([0.1, 0.5]), path) == path
    return path.read_text(encoding="utf-8")


def test_a_saved_figure_opens_without_a_network(saved):
    assert saved.lstrip().lower().startswith(("<html", "<!doctype html"))
    assert "Plotly.newPlot(" in saved
    assert len(saved) > 1_000_000  # plotly.js itself
    assert not re.search(r"<(script|link|img)\b[^>]*\b(src|href)=", saved)


def test_a_saved_figure_holds_the_figure(saved):
    assert "Relative decoder norm of 2 living latents" in saved
