import copy
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from analysis.hand_made import RECONSTRUCTION, crosscoder, latent_measures, measurement
from safetensors.torch import load_file, save_file

from tl_crosscoder import Crosscoder, Measurement, TrainConfig, Trainer, files, measure
from tl_crosscoder.analysis.geometry import LATENT_CLASSES
from tl_crosscoder.config.presets import preset

CONFIG = TrainConfig(
    d_sae=48,
    n_tokens=40 * 128,
    batch_size=128,
    lr=3e-3,
    lr_warmup_steps=5,
    buffer_contexts=30,
    dead_after_tokens=600,
)


def trained_on(pair, texts) -> Crosscoder:
    return Trainer(pair, *texts, config=CONFIG, recipe=preset("batchtopk", k=4)).fit()


@pytest.fixture(scope="module")
def taboo_crosscoder(taboo_pair, texts) -> Crosscoder:
    return trained_on(taboo_pair, texts)


@pytest.fixture(scope="module")
def measured(taboo_pair, taboo_crosscoder, texts) -> Measurement:
    return measure(taboo_pair, taboo_crosscoder, texts[1], n_top=5, n_examples=3)


@pytest.fixture(scope="module")
def rows(taboo_pair, texts):
    """Activations of the tokens that count, and where those stand in the flattened text."""
    held_out = texts[1]
    x = taboo_pair.activations(held_out.tokens)[held_out.mask]
    return x, held_out.mask.flatten().nonzero().squeeze(-1)


def assert_equal(one: Measurement, other: Measurement):
    """Every field, NaN equal to NaN."""
    # repr tells NaN from null and keeps every digit of a float.
    assert repr(one.reconstruction) == repr(other.reconstruction)
    assert repr(one.top) == repr(other.top)
    assert one.sources == other.sources
    tables = [m.latents.tables() for m in (one, other)]
    assert tables[0].keys() == tables[1].keys()
    assert all(table.facts() == tables[1][name].facts() for name, table in tables[0].items())
    for of, saved in (
        (one.latents.tensors(), other.latents.tensors()),
        (vars(one.top_tokens), vars(other.top_tokens)),
        *((table.tensors(), tables[1][name].tensors()) for name, table in tables[0].items()),
    ):
        for name, tensor in of.items():
            assert saved[name].dtype == tensor.dtype, name
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_nan_and_none_survive_saving_and_the_file_is_strict_json(tmp_path):
    latents = latent_measures([0.0, 1.0], [0.0, 1.0], [0, 20])
    undefined = replace(
        RECONSTRUCTION,
        fve={"base": math.nan, "finetuned": 0.5},
        difference_fve=None,
        difference_fve_by_class=None,
    )
    made = measurement(latents, examples={1: []}, reconstruction=undefined)
    assert made.latents.relative_decoder_norm[0].isnan()
    wanted = "At 'base' the activation is the same at all of these tokens"
    assert any(note.startswith(wanted) for note in made.sections()[0].notes)
    path = made.save(tmp_path)
    json.loads(path.read_text(), parse_constant=pytest.fail)
    assert_equal(Measurement.load(tmp_path), made)


def test_an_fve_below_zero_is_said():
    worse = replace(RECONSTRUCTION, fve={"base": -1.6e24, "finetuned": 0.5})
    latents = latent_measures([0.0, 1.0], [0.0, 1.0], [0, 20])
    made = measurement(latents, examples={1: []}, reconstruction=worse)
    assert any("At 'base' the FVE is below 0" in note for note in made.sections()[0].notes)


def test_a_folder_without_measures_is_refused(measured, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no measures .*analyze --fresh"):
        Measurement.load(tmp_path)
    measured.save(tmp_path)
    path = tmp_path / "analysis.safetensors"
    tensors = load_file(path)
    tensors["difference.alone"] = tensors.pop("difference.explained_difference")
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"is damaged: its sha256 is not the one in analysis.json"):
        Measurement.load(tmp_path)
    facts = tmp_path / "analysis.json"
    content = json.loads(facts.read_text())
    content["sha256"] = files.sha256(path)
    facts.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"of an earlier version .*analyze --fresh"):
        Measurement.load(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="holds no measures"):
        Measurement.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("analysis.json", lambda _: b"[]"),
        ("analysis.json", lambda _: b"3"),
        ("analysis.json", lambda _: b"[" * 100_000),
        ("analysis.json", lambda data: data.replace(b'"order"', b'"other"')),
        ("analysis.json", lambda _: b'{"reconstruction": [1]}'),
        ("analysis.json", lambda _: b'{"reconstruction": {"fve": 1}}'),
        ("analysis.safetensors", lambda data: data[:100]),
        ("analysis.safetensors", lambda _: b""),
        ("analysis.safetensors", lambda data: b"\xff" * 8 + data[8:]),
        ("analysis.safetensors", lambda data: data.replace(b"F64", b"F99", 1)),
        ("analysis.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    ],
)
def test_damaged_measures_are_refused_with_a_sentence(measured, tmp_path, name, damage):
    measured.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"(analysis|holds measures)"):
        Measurement.load(tmp_path)


def test_firing_is_counted_for_every_source(measured, taboo_crosscoder, texts, rows):
    is_active = taboo_crosscoder.encode(rows[0]) > 0
    source_ids = texts[1].source_ids[texts[1].mask]
    assert measured.sources == texts[1].sources
    assert len(measured.sources) > 1
    for i, source in enumerate(measured.sources):
        counted = is_active[source_ids == i].sum(dim=0)
        assert torch.equal(measured.latents.firing.n_active_by_source[i].long(), counted), source
    assert torch.equal(measured.latents.n_active.long(), is_active.sum(dim=0))
    assert measured.reconstruction.n_tokens == texts[1].n_tokens
    assert measured.reconstruction.l0 == pytest.approx(is_active.sum() / len(is_active))


def test_norms_are_read_in_the_normalised_space(measured, taboo_crosscoder):
    assert len({s.scale for s in taboo_crosscoder.sites}) == 2
    base, finetuned = taboo_crosscoder.decoder_norms().T
    torch.testing.assert_close(
        measured.latents.relative_decoder_norm, finetuned / (base + finetuned)
    )
    larger = torch.maximum(base, finetuned)
    torch.testing.assert_close(measured.latents.delta_norm, (1 + (finetuned - base) / larger) / 2)


def test_top_tokens_are_positions_of_the_text(measured, taboo_crosscoder, rows):
    codes = torch.zeros(rows[1].max() + 1, CONFIG.d_sae)
    codes[rows[1]] = taboo_crosscoder.encode(rows[0])
    top = measured.top_tokens
    torch.testing.assert_close(top.values, codes.topk(3, dim=0).values)
    torch.testing.assert_close(codes.gather(0, top.positions.clamp(min=0)), top.values)


def test_examples_of_a_ranked_latent_are_its_top_tokens(measured, texts, taboo_pair):
    first = measured.top[0]
    position = measured.top_tokens.positions[0, first.latent]
    assert len(first.examples) == 3
    assert first.examples[0].token == taboo_pair.tokenizer.decode(
        [texts[1].tokens.flatten()[position]]
    )
    values = [e.value for e in first.examples]
    assert values == sorted(values, reverse=True)


def test_the_size_of_the_batches_does_not_matter_and_the_dictionary_stays(
    measured, taboo_pair, taboo_crosscoder, texts
):
    before = copy.deepcopy(taboo_crosscoder.state_dict())
    again = measure(taboo_pair, taboo_crosscoder, texts[1], n_top=5, n_examples=3, batch_size=7)
    for name, tensor in taboo_crosscoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    one, other = asdict(again.reconstruction), asdict(measured.reconstruction)
    for name, value in one.items():
        assert value == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
    assert [s.latent for s in again.top] == [s.latent for s in measured.top]
    torch.testing.assert_close(again.top_tokens.values, measured.top_tokens.values)


def test_class_counts_are_those_of_active_latents():
    # Delta-norms: 0 (base-only), 0.5 (shared) twice, 0.75 (other), 1 twice, NaN (other);
    # one of the shared and one of the fine-tuned only are never active.
    latents = latent_measures(
        [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
        [0.0, 1.0, 1.0, 2.0, 1.0, 1.0, 0.0],
        [1, 1, 0, 1, 1, 0, 1],
    )
    counts = measurement(latents, examples={}).class_counts
    assert counts == {"base-only": 1, "shared": 1, "other": 2, "finetuned-only": 1}


def test_a_latent_that_writes_nothing_is_other_and_not_ranked(
    taboo_pair, taboo_crosscoder, texts, tmp_path
):
    silenced = copy.deepcopy(taboo_crosscoder)
    with torch.no_grad():
        silenced.W_dec[:3] = 0
    made = measure(taboo_pair, silenced, texts[1][:20], n_top=48)
    assert made.latents.relative_decoder_norm[:3].isnan().all()
    assert made.latents.delta_norm[3:].isfinite().all()
    assert {LATENT_CLASSES[i] for i in made.latents.class_ids[:3]} == {"other"}
    assert not {0, 1, 2} & {s.latent for s in made.top}
    made.save(tmp_path)
    assert_equal(Measurement.load(tmp_path), made)


def test_a_crosscoder_of_other_sites_is_refused(taboo_pair, texts):
    other = crosscoder(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"trained on the sites .*cfg\.json names"):
        measure(taboo_pair, other, texts[1])


@pytest.fixture(scope="module")
def null(null_pair, texts) -> tuple[Crosscoder, Measurement]:
    """A model against itself: there is nothing to find."""
    trained = trained_on(null_pair, texts)
    return trained, measure(null_pair, trained, texts[1])


def test_between_a_model_and_itself_there_is_no_difference(null, tmp_path):
    crosscoder, measured = null
    assert torch.equal(crosscoder.decoder("base"), crosscoder.decoder("finetuned"))
    assert torch.equal(crosscoder.encoder("base"), crosscoder.encoder("finetuned"))
    assert crosscoder.decoder("base").std() > 0
    reconstruction = measured.reconstruction
    assert reconstruction.difference_fve is None
    assert reconstruction.difference_fve_by_class is None
    assert reconstruction.difference_share == 0
    assert reconstruction.fve["base"] == reconstruction.fve["finetuned"] > 0.3
    n_active = int((measured.latents.n_active > 0).sum())
    assert n_active > 40
    counts = {"base-only": 0, "shared": n_active, "other": 0, "finetuned-only": 0}
    assert measured.class_counts == counts
    assert (measured.latents.relative_decoder_norm == 0.5).all()
    assert (measured.latents.delta_norm == 0.5).all()
    torch.testing.assert_close(measured.latents.decoder_cosine, torch.ones(48))
    measured.save(tmp_path)
    assert_equal(Measurement.load(tmp_path), measured)
