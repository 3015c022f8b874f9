"""Any sites: train, save, load, find the models again, measure again."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from models.tiny_pairs import HOOK

from tl_crosscoder import Crosscoder, Measurement, ModelPair, TrainConfig, Trainer, measure
from tl_crosscoder.crosscoder.site_views import check_sites
from tl_crosscoder.models.pair import planned_sites
from tl_crosscoder.report.figures import relative_norm_histogram
from tl_crosscoder.report.sections import render
from tl_crosscoder.results.render import WIDTH

CONFIG = TrainConfig(
    d_sae=64,
    n_tokens=60 * 128,
    batch_size=128,
    lr=5e-3,
    lr_warmup_steps=5,
    buffer_contexts=60,
    log_every=30,
)
LOW = "blocks.0.hook_resid_post"
KINDS = ["single", "three", "grid", "unequal", "difference"]


def source_of(kind, site_folders):
    base, sft, rl, wide = (site_folders[n] for n in ("base", "sft", "rl", "wide"))
    if kind == "difference":
        return ModelPair.from_pretrained(base, sft, hook_name=HOOK).difference()
    names, hooks = {
        "single": ([base], HOOK),
        "three": ([base, sft, rl], HOOK),
        "grid": ([base, sft], [LOW, HOOK]),
        "unequal": ([base, wide], HOOK),
    }[kind]
    if kind == "single":
        return ModelPair.from_sites(planned_sites(names, hooks))
    return ModelPair.from_pretrained(names[0], names[1:] or None, hook_name=hooks)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def run(kind, site_folders, short_texts, tmp_path_factory):
    """(source, folder, measurement) of a trained dictionary of each kind."""
    source = source_of(kind, site_folders)
    folder = tmp_path_factory.mktemp(kind) / "run"
    crosscoder = Trainer(source, *short_texts, config=CONFIG, output=folder).fit()
    return source, folder, measure(source, crosscoder, short_texts[1], n_top=4)


def test_every_site_is_explained_and_training_says_how_well(run, kind):
    source, folder, measurement = run
    names = [s.name for s in source.sites]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert list(measurement.reconstruction.fve) == names
    for name in names:
        assert measurement.reconstruction.fve[name] > 0.3
        assert rows[-1][f"fve/{name}"] > rows[0][f"fve/{name}"]
    assert ("fve/difference" in rows[0]) == (kind not in ("single", "unequal"))


def test_a_saved_dictionary_finds_its_models_and_measures_the_same(run, short_texts):
    _, folder, measurement = run
    crosscoder = Crosscoder.load(folder)
    again = measure(ModelPair.from_sites(crosscoder.sites), crosscoder, short_texts[1], n_top=4)
    assert repr(again.reconstruction) == repr(measurement.reconstruction)
    assert [s.latent for s in again.top] == [s.latent for s in measurement.top]
    for name, tensor in measurement.latents.tensors().items():
        same = again.latents.tensors()[name]
        torch.testing.assert_close(same, tensor, rtol=0, atol=0, equal_nan=True)
    record = json.loads((folder / "runner_cfg.json").read_text())
    names = [s["name"] for s in record["sites"]]
    assert names == [s.name for s in crosscoder.sites]


def test_a_saved_measurement_is_loaded_equal(run, tmp_path):
    measurement = run[2]
    measurement.save(tmp_path)
    loaded = Measurement.load(tmp_path)
    # repr tells NaN from null.
    assert repr(loaded.reconstruction) == repr(measurement.reconstruction)
    assert repr(loaded.top) == repr(measurement.top)
    assert loaded.compared == measurement.compared
    json.loads((tmp_path / "analysis.json").read_text(), parse_constant=pytest.fail)


def test_what_is_compared_and_what_there_is_not_to_compare(run, kind):
    source, _, measurement = run
    r, latents = measurement.reconstruction, measurement.latents
    names = [s.name for s in source.sites]
    if kind in ("single", "difference"):
        assert measurement.compared is None
        assert latents.relative_decoder_norm.isnan().all()
        counts = [s.ranked.n_active for s in measurement.top]
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == latents.n_active.max()
    else:
        last = 2 if kind == "grid" else len(names) - 1
        assert measurement.compared == (names[0], names[last])
        alive = latents.n_active > 0
        assert latents.relative_decoder_norm[alive].isfinite().all()
    has_difference = kind in ("three", "grid")
    assert (r.difference_share is not None) == has_difference
    assert (r.difference_fve is not None) == has_difference


def test_the_printed_measures_are_sensible(run, kind):
    source, _, measurement = run
    text = render(measurement, source.sites)
    assert "nan" not in text.lower()
    assert max(map(len, text.splitlines())) <= WIDTH
    title = " ".join(text.split("\n\n")[0].split())
    assert title.startswith("What there is in" if kind == "single" else "What changed from")
    assert title.count(" to ") == {"three": 2, "single": 0}.get(kind, 1)
    assert ("FVE of the" in text) == (kind not in ("single", "difference", "unequal"))
    assert ("The sites differ in width" in text) == (kind == "unequal")
    assert ("finetuned-only" in text) == (measurement.compared is not None)
    if measurement.compared is None:
        with pytest.raises(ValueError, match="single site has no relative decoder norms"):
            relative_norm_histogram(measurement)
    assert ("active on most tokens" in text) == (measurement.compared is None)
    if kind == "three":
        assert "compare finetuned_2 (as finetuned) with base (as base)" in text
        assert "most likely to be specific to finetuned_2" in text


@pytest.mark.parametrize("kind", ["grid", "unequal"], scope="module")
def test_a_run_of_any_sites_resumes_to_the_same_bits(run, short_texts, tmp_path):
    config = replace(CONFIG, checkpoint_every=20)
    trainer = Trainer(run[0], *short_texts, config=config, output=tmp_path / "run")
    trainer.begin()
    for batch, position in trainer.loader.batches():
        trainer.step(batch)
        trainer.state.position = position
        if trainer.state.step == 20:
            break
    trainer.save()
    resumed = Trainer(run[0], *short_texts, config=config, output=tmp_path / "run", resume=True)
    assert resumed.state.step == 20
    expected = Crosscoder.load(run[1]).state_dict()
    for name, tensor in resumed.fit().state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("kind", ["three"], scope="module")
def test_the_sites_compared_are_those_chosen_on_the_source(run, short_texts):
    source, folder, measurement = run
    crosscoder = Crosscoder.load(folder)
    chosen = measure(source.comparing("base", "finetuned"), crosscoder, short_texts[1])
    assert (measurement.compared, chosen.compared) == (
        ("base", "finetuned_2"),
        ("base", "finetuned"),
    )
    scaled = [crosscoder.decoder(i) * crosscoder.sites[i].scale for i in (0, 1)]
    base, finetuned = (rows.norm(dim=1) for rows in scaled)
    expected = finetuned / (base + finetuned)
    torch.testing.assert_close(chosen.latents.relative_decoder_norm, expected, equal_nan=True)


def flipped(crosscoder: Crosscoder) -> Crosscoder:
    """The same dictionary with its sites, and their weights, in reverse order."""
    sites = crosscoder.sites[::-1]
    made = Crosscoder(replace(crosscoder.cfg, sites=sites))
    weights = dict(crosscoder.state_dict())
    for name, dim in (("W_enc", 0), ("W_dec", 1), ("b_dec", 0)):
        parts = weights[name].split([s.d_model for s in crosscoder.sites], dim=dim)
        weights[name] = torch.cat(parts[::-1], dim=dim)
    made.load_state_dict(weights)
    return made


@pytest.mark.parametrize("kind", ["three", "unequal"], scope="module")
def test_swapped_order_mirrors(run, kind, short_texts):
    source, folder, measurement = run
    crosscoder = flipped(Crosscoder.load(folder))
    swapped = ModelPair(*source.models[::-1], sites=source.model_sites[::-1])
    mirrored = measure(swapped, crosscoder, short_texts[1])
    one, other = asdict(measurement.reconstruction), asdict(mirrored.reconstruction)
    assert other["fve"] == pytest.approx(one["fve"], rel=1e-4)
    assert other["l0"] == pytest.approx(one["l0"], rel=1e-3)
    if kind != "unequal":
        assert other["difference_fve"] == pytest.approx(one["difference_fve"], rel=1e-3)
    assert mirrored.compared == measurement.compared[::-1]
    torch.testing.assert_close(
        mirrored.latents.relative_decoder_norm,
        1 - measurement.latents.relative_decoder_norm,
        equal_nan=True,
    )
    swap = {"base-only": "finetuned-only", "finetuned-only": "base-only"}
    counts = {swap.get(name, name): n for name, n in measurement.class_counts.items()}
    assert mirrored.class_counts == counts


def test_a_wider_site_does_not_lean_by_its_width():
    """A latent that is as large a part of both sites is shared, R = 1/2, whatever their widths.

    Rows of norm sqrt(width) in sites whose mean squared norm is their width.
    """
    from analysis.hand_made import sites

    from tl_crosscoder.analysis.geometry import normalised_decoders, relative_decoder_norm

    base, finetuned = sites(4)
    of = (base, replace(finetuned, d_model=9, scale=2.0))
    # 4 ones have norm 2, and 9 halves times the scale 2 have norm 3 = 2 * sqrt(9 / 4).
    W_dec = torch.cat([torch.ones(1, 4), torch.full((1, 9), 0.5)], dim=1)
    decoders = normalised_decoders(W_dec, of, (0, 1))
    norms = [d.norm(dim=-1) for d in decoders]
    torch.testing.assert_close(relative_decoder_norm(*norms), torch.tensor([0.5]))


def test_a_difference_and_its_models_are_not_taken_for_each_other(site_folders, short_texts):
    pair = ModelPair.from_pretrained(site_folders["base"], site_folders["sft"], hook_name=HOOK)
    short = replace(CONFIG, n_tokens=256)
    crosscoder = Trainer(pair.difference(), *short_texts, config=short).fit()
    check_sites(pair.difference(), crosscoder)
    with pytest.raises(ValueError, match=r"trained on the sites .*take their pair\.difference\(\)"):
        measure(pair, crosscoder, short_texts[1])
    other_way = pair.difference("base", minus="finetuned")
    with pytest.raises(ValueError, match="trained on the sites"):
        measure(other_way, crosscoder, short_texts[1])
    assert math.isnan(
        measure(pair.difference(), crosscoder, short_texts[1]).latents.delta_norm[0].item()
    )
