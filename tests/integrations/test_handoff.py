"""A small run handed to other tools."""

import gzip
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from tl_crosscoder import Crosscoder, ModelPair, Site
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.cli.main import main
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.data.harvest import harvest
from tl_crosscoder.integrations.config import HandoffConfig
from tl_crosscoder.integrations.handoff import hand_off
from tl_crosscoder.integrations.judging import Judged, JudgedLatent
from tl_crosscoder.integrations.sae_dashboard import ShownSite


@pytest.fixture(scope="module")
def dense(trained):
    """Codes `[contexts, pos, d_sae]` of the held-out text, encoded one batch at a time."""
    source, text = trained.measured()
    codes = torch.zeros(*text.tokens.shape, trained.crosscoder.cfg.d_sae)
    for part in harvest(source, text):
        own = torch.zeros(*part.text.mask.shape, codes.shape[-1])
        own[part.text.mask] = trained.crosscoder.encode(part.rows).detach()
        codes[part.index] = own
    return codes, text


def rows(path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_delphi_gets_every_code_of_the_text(trained, tmp_path, dense):
    hand_off(trained, tmp_path / "out", HandoffConfig(to="delphi"))
    codes, text = dense
    found = torch.zeros_like(codes)
    folder = tmp_path / "out/latents/blocks.1.hook_resid_post"
    files = sorted(folder.glob("*.safetensors"))
    # 40 latents in 5 files, named by the first and the last of each.
    assert {p.stem for p in files} == {"0_7", "8_15", "16_23", "24_31", "32_39"}
    for path in files:
        split = load_file(path)
        assert torch.equal(split["tokens"], text.tokens.long())
        assert split["locations"].dtype == torch.uint16
        context, position, latent = split["locations"].long().T
        found[context, position, latent + int(path.stem.split("_")[0])] = split["activations"]
    torch.testing.assert_close(found, codes)
    assert (tmp_path / "out/tokenizer/tokenizer.json").is_file()
    config = json.loads((folder / "config.json").read_text())
    assert (config["cache_ctx_len"], config["n_splits"]) == (32, 5)


def test_the_verb_writes_dashboards_that_count_over_the_whole_text(
    trained, tmp_path, dense, capsys
):
    flags = ["--to", "sae-dashboard", "--output", str(tmp_path / "out"), "--model-id", "m"]
    assert main(["handoff", str(trained.path), *flags]) == 0
    assert "  batch-0.json" in capsys.readouterr().out
    codes, text = dense
    batch = json.loads((tmp_path / "out/batch-0.json").read_text())
    skipped = json.loads((tmp_path / "out/skipped_indexes.json").read_text())["skipped_indexes"]
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("m", 1, "tl-crosscoder")
    shown = [f["feature_index"] for f in batch["features"]]
    assert sorted([*shown, *skipped]) == list(range(40))
    decoder = trained.crosscoder.decoder("finetuned")
    with ExampleDatabase.open(trained.path / "examples.sqlite") as database:
        for f in batch["features"]:
            j = f["feature_index"]
            own = codes[..., j][codes[..., j] > 0]
            top = pytest.approx(own.max().item(), rel=1e-4)
            assert f["frac_nonzero"] == pytest.approx(len(own) / text.n_tokens)
            # A histogram from 0 to the largest code, naively.
            at = (own / own.max() * 50).long().clamp(max=49)
            naive = torch.bincount(at, minlength=50).float()
            assert (torch.tensor(f["freq_hist_data_bar_heights"]) - naive).abs().sum() <= 2
            assert sum(f["freq_hist_data_bar_heights"]) == len(own)
            assert f["vector"] == pytest.approx(decoder[j].tolist(), rel=1e-3, abs=1e-6)
            assert f["pos_values"] == sorted(f["pos_values"], reverse=True)
            assert f["neg_values"] == sorted(f["neg_values"])
            stored = sorted(e.tokens for e in database.latent(j))
            assert sorted(tuple(a["tokens"]) for a in f["activations"]) == stored
            for a in f["activations"]:
                value = a["values"][a["qualifying_token_index"]]
                if a["bin_contains"] == -1:
                    assert (a["bin_min"], a["bin_max"]) == (-1, top)
                else:
                    assert a["bin_min"] - 1e-4 <= value <= a["bin_max"] + 1e-4
            shares = {a["bin_min"]: a["bin_contains"] for a in f["activations"]}
            # From 0 on come all tokens without it, and those up to a fifth of its largest code.
            if 0.0 in shares:
                weak = 1 - (own > own.max() / 5).sum().item() / text.n_tokens
                assert shares[0.0] == pytest.approx(weak, abs=1e-4)


def test_neuronpedia_gets_rows_that_belong_together(run, tmp_path):
    """With the names that a judge gave."""
    judged = [
        JudgedLatent(
            latent=j, name="n", explanation=text, detection=0.75, detection_low=0.5,
            detection_high=1.0, control=math.nan, control_of=None, n_active=4, n_inactive=4,
            n_read=8, n_read_control=0,
        ) for j, text in ((3, "e"), (5, ""), (9, "of another"))
    ]  # fmt: skip
    names = Judged(rows=tuple(judged), model="rule", seed=0, n_hard=0)
    loaded = Judged.load(names.save(run.path / "judged.json"))
    assert repr(loaded) == repr(names)
    assert loaded.mean(lambda r: r.detection) == 0.75
    assert math.isnan(loaded.mean(lambda r: r.control))
    for name in ("one", "two"):
        hand_off(run, tmp_path / name, HandoffConfig(to="neuronpedia", latents=(3, 5, 8)))
    source = tmp_path / "one/false-fact/1-tl-crosscoder"
    features, activations, explanations = (
        rows(source / kind / "batch-0.jsonl.gz")
        for kind in ("features", "activations", "explanations")
    )
    about = {
        name: json.loads((source / f"{name}.jsonl").read_text())
        for name in ("release", "model", "sourceset", "source")
    }
    keys = {(f["modelId"], f["layer"], f["index"]) for f in features}
    assert keys == {("false-fact", "1-tl-crosscoder", j) for j in "358"}
    assert {(a["modelId"], a["layer"], a["index"]) for a in activations} == keys
    assert len({a["id"] for a in activations}) == len(activations)
    assert {len(a["id"]) for a in activations} == {25}
    assert about["source"]["id"] == "1-tl-crosscoder"
    assert about["sourceset"]["name"] == about["source"]["setName"] == features[0]["sourceSetName"]
    assert about["sourceset"]["releaseName"] == about["release"]["name"]
    assert about["model"]["id"] == "false-fact"
    for a in activations:
        assert len(a["tokens"]) == len(a["values"])
        assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
    assert [(e["index"], e["description"]) for e in explanations] == [("3", "n: e")]
    assert "accuracy of detection 0.75 [0.50, 1.00] on 8 windows" in explanations[0]["notes"]
    # The same run is the same bytes.
    for path in source.rglob("*.gz"):
        again = tmp_path / "two" / path.relative_to(tmp_path / "one")
        assert path.read_bytes() == again.read_bytes()


def test_bad_names_and_folders_are_refused_before_any_work(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("tl_crosscoder.integrations.handoff.find_active", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(ValueError, match="is not an empty folder"):
        hand_off(trained, tmp_path / "full", HandoffConfig(to="neuronpedia"))
    with pytest.raises(ValueError, match="'a b' is not a name on Neuronpedia"):
        HandoffConfig(to="neuronpedia", set_name="a b")
    with pytest.raises(ValueError, match=r"site 'other' .* has \['base', 'finetuned'\]"):
        hand_off(trained, tmp_path / "new", HandoffConfig(to="neuronpedia", site="other"))
    assert not (tmp_path / "new").exists()


def test_a_site_off_the_residual_stream_has_no_dashboard(taboo_pair):
    hooks = ("blocks.1.hook_resid_post", "blocks.1.mlp.hook_post")
    sites = [Site(name=h[9:], hook_name=h, model_name="m") for h in hooks]
    models = ModelPair(*[taboo_pair.models[0]] * 2, sites=sites)
    d_in = sum(site.d_model for site in models.sites)
    made = Crosscoder(CrosscoderConfig(d_in=d_in, d_sae=8, sites=models.sites))
    with pytest.raises(
        ValueError, match=r"'mlp.hook_post' is 256 wide .* \(--site\) of \[\('hook_"
    ):
        ShownSite.of(models, made)
    assert ShownSite.of(models, made, "hook_resid_post").decoder.shape == (8, 96)
