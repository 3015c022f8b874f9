"""What passes each layer, against the waterfall and a naive loop, and the rule that chooses one."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from tl_crosscoder import ModelPair
from tl_crosscoder.config.scan import ScanSettings
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.layer_scan import scan_layers
from tl_crosscoder.interventions.layer_scan_result import LayerScan, recommended
from tl_crosscoder.interventions.waterfall import REACHABLE, WHOLE, waterfall
from tl_crosscoder.report.figures import layer_curves

POST = "blocks.{layer}.hook_resid_post"


@pytest.fixture
def predictions(words) -> Predictions:
    return Predictions.of(words[1][:4])


@pytest.mark.parametrize("template", [POST, "blocks.{layer}.hook_mlp_out"])
def test_a_layer_is_what_the_waterfall_says_of_its_hook(
    pair, make_crosscoder, predictions, template
):
    settings = ScanSettings(hook_template=template)
    scan = scan_layers(pair, predictions, settings=settings, n_draws=50, seed=3)
    assert [row.layer for row in scan.rows] == [0, 1, 2]
    here = pair.at(template.format(layer=1))
    how = {"ranked": [0], "sizes": (1,), "n_draws": 50, "seed": 3}
    parts = waterfall(here, make_crosscoder(here), predictions, **how)
    reached, row = parts.row(REACHABLE), scan.rows[1]
    for mine, theirs in {"kl": "kl", "passing_share": "share"}.items():
        for end in ("", "_low", "_high"):
            expected = getattr(reached, theirs + end)
            assert getattr(row, mine + end) == pytest.approx(expected, rel=1e-3), mine + end
    assert scan.kl == pytest.approx(parts.row(WHOLE).kl)
    assert row.rise == pytest.approx(row.passing_share - scan.rows[0].passing_share)
    assert scan.text == parts.text
    # The size of the difference, a token at a time.
    x, text = here.activations(predictions.text.tokens), predictions.text
    sizes = (x[:, :, 1] - x[:, :, 0]).norm(dim=-1) / x[:, :, 0].norm(dim=-1)
    expected = sum(sizes[i, t].item() for i, t in text.mask.nonzero().tolist()) / text.n_tokens
    assert row.relative_difference == row.text_difference == pytest.approx(expected)
    assert math.isnan(row.user_difference)


def test_each_layer_is_what_one_replacement_loses(taboo_pair, texts):
    """And in a chat the difference of each role."""
    text = texts[1][:6]
    places = Predictions.of(text).places
    scan = scan_layers(taboo_pair, Predictions.of(text), settings=ScanSettings(layers=(2, 0)))
    assert [row.layer for row in scan.rows] == [0, 2]
    asked = places.mask(text.role_ids, text.dropped)[:, 1:]
    log_p = taboo_pair.logits(text.tokens)[:, :-1][asked].log_softmax(-1)
    for row in scan.rows:
        there = taboo_pair.at(row.hook_name)
        x = there.activations(text.tokens)
        log_q = there.run_with_patch(text.tokens, x[:, :, 0])[:, :-1][asked].log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        assert row.kl == pytest.approx(kl, rel=1e-3)
    sizes = ((x[:, :, 1] - x[:, :, 0]).norm(dim=-1) / x[:, :, 0].norm(dim=-1))[text.mask]
    roles = text.role_ids[text.mask]
    assert scan.rows[1].assistant_difference == pytest.approx(sizes[roles == 3].mean().item())
    assert "assistant" in str(scan)
    assert 0 < scan.rows[0].passing_share < scan.rows[1].passing_share < 1


def test_models_that_predict_the_same_have_nothing_to_pass(pairs, predictions, tmp_path):
    with torch.inference_mode():  # nothing here asks for a gradient
        scan = scan_layers(pairs["equal"], predictions)
    assert (scan.kl, scan.rows[2].relative_difference) == (0, 0)
    assert all(math.isnan(row.passing_share) for row in scan.rows)
    assert scan.hook_name == POST.format(layer=1)
    assert "the models predict the same on this text" in scan.line()
    assert "rises" not in str(scan)
    assert layer_curves(scan).data[0].y == (None, None, None)
    assert "KL 0 nats a token, predictions of all tokens" in str(scan)
    again = LayerScan.load(scan.save(tmp_path / "scan.json"))
    assert str(again) == str(scan)
    assert again.hook_name == scan.hook_name


@pytest.mark.parametrize(
    ("shares", "n_layers", "chosen", "why"),
    [
        # Below the last quarter are layers 0 to 5 of 8; the middle is layer 4.
        ([0.1, 0.2, 0.5, 0.7, 0.85, 0.9, 0.95, 1], 8, 4, "where 80% does"),
        ([0.9, 0.9, 0.9, 0.9, 0.95, 0.9, 0.95, 1], 8, 4, "95% of the change passes it; of"),
        ([0.1, 0.2, 0.3, 0.4, 0.6, 0.85, 0.95, 1], 8, 5, "where 80% does"),
        ([0.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1], 8, 5, "more than any other layer (the last"),
        ([0.0, 0.0, 0.1, 0.2, 0.37, 0.4, 0.5, 1], 8, 4, "as layer 5 (40%)"),
        ([0.0, 0.0, 0.0, 0.0, 0.01, 0.04, 0.3, 1], 8, 7, "less than 5% passes any layer below"),
        ([0.0, 0.0, 0.0, 0.0, 0.01, 0.04, 0.85, 1], 8, 6, "what changed is close to the output"),
        ([0.0, 0.0, 0.0, 0.0, 0.0, 0.01, 0.01, 0.02], 8, 4, "passes any of these hook points"),
        ([math.nan] * 8, 8, 4, "predict the same"),
        # One with as much on either side of the middle: the larger share; above 100 % all are full.
        ([0.1, 0.1, 0.1, 0.81, 0.3, 0.9, 1, 1], 8, 5, "90% of the change passes it"),
        ([0.1, 0.2, 0.5, 1.4, 1.2, 0.9, 1, 1], 8, 4, "120% of the change passes it (more than"),
        ([1.0], 1, 0, "100% of the change"),
        ([0.3, 1.0], 2, 0, "30% of the change"),
    ],
)
def test_the_rule_on_curves_by_hand(shares, n_layers, chosen, why):
    place, reason = recommended(shares, range(len(shares)), n_layers=n_layers)
    assert place == chosen
    assert why in reason


def test_of_the_layers_that_were_scanned():
    """Layers 6 and 7 of 8 are the last quarter, and taken where there are no others."""
    assert recommended([0.9, 1.0], [6, 7], n_layers=8)[0] == 0
    assert recommended([0.2, 0.9], [1, 6], n_layers=8)[0] == 0


def test_the_figure_marks_the_layer_and_shades_what_is_left_out(pair, predictions):
    scan = scan_layers(pair, predictions)
    figure = layer_curves(replace(scan, n_layers=2))  # layers 1 and 2 are then too late
    assert figure.data[0].y == pytest.approx([row.passing_share for row in scan.rows])
    dashed = [s for s in figure.layout.shapes if s.type == "line"]
    assert {s.x0 for s in dashed} == {1}
    assert {(s.x0, s.x1) for s in figure.layout.shapes if s.type == "rect"} == {(0.5, 2.5)}
    assert [trace.name for trace in figure.data] == ["passes", "all tokens"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (3,)}, "the models have 3, numbered 0 to 2"),
        ({"layers": ()}, "the models have 3, numbered 0 to 2"),
        ({"hook_template": "blocks.1.hook_resid_post"}, "must hold {layer} in the place of"),
        ({"hook_template": "blocks.{layer}.resid_post"}, "nearest: 'blocks.0.hook_resid_post'"),
    ],
)
def test_hook_points_that_cannot_be_are_refused(pairs, predictions, settings, message):
    with pytest.raises(ValueError, match=message):
        scan_layers(pairs["hooked"], predictions, settings=ScanSettings(**settings))


def test_two_hook_points_of_one_model_are_no_two_models(pairs, predictions):
    one = pairs["hooked"].models[0]
    pair = ModelPair(one, hook_name=[POST.format(layer=i) for i in (0, 1)], model_names=["m"])
    with pytest.raises(ValueError, match="compares two models, but these sites are of one"):
        scan_layers(pair, predictions)


def test_a_pair_is_read_elsewhere_and_compared_as_before(pairs):
    one, other = pairs["hooked"].models
    both = ModelPair(one, other, one, sites=[
        replace(site, name=name) for site, name in
        zip([*pairs["hooked"].model_sites, pairs["hooked"].model_sites[0]], "abc", strict=True)
    ])  # fmt: skip
    view = both.comparing("b", "a").difference().at(POST.format(layer=0))
    assert view.compared_names == ("b", "a")
    assert view.is_difference
    assert [site.name for site in view.model_sites] == ["a", "b", "c"]
    several = pairs["hooked"].at([POST.format(layer=i) for i in (0, 2)])
    assert several.compared_names == (
        f"base@{POST}".format(layer=0),
        f"finetuned@{POST}".format(layer=0),
    )
    again = several.at(POST.format(layer=1))
    assert again.sites == pairs["hooked"].sites


def test_one_name_for_both_is_no_error(null_pair, texts):
    """A model that is loaded once for two sites runs as two."""
    scan = scan_layers(null_pair, Predictions.of(texts[1][:3]))
    assert scan.kl == 0
    assert math.isnan(scan.rows[3].passing_share)
    assert scan.rows[3].relative_difference == 0


def test_predictions_that_are_no_numbers_are_named(pairs, predictions):
    base, finetuned = pairs["hooked"].models
    broken = copy.deepcopy(finetuned)
    broken.unembed.W_U.data[0, 0] = math.inf
    pair = ModelPair(base, broken, hook_name=POST.format(layer=1), model_names=["base", "broken"])
    with pytest.raises(ValueError, match=r"is nan on this text.*bfloat16"):
        scan_layers(pair, predictions)
