"""A small run handed to other tools, and to a judge, by the verbs."""

import gzip
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tl_crosscoder import Crosscoder, CrosscoderConfig, ModelPair, Site
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.cli.judge import Handoff, Judge
from tl_crosscoder.data.harvest import harvest
from tl_crosscoder.integrations.judge.judged import Judged
from tl_crosscoder.integrations.shown_site import ShownSite
from tl_crosscoder.run.run import Run


@pytest.fixture(scope="module")
def dense(trained):
    """Codes `[contexts, pos, d_sae]` of the held-out text, encoded one batch at a time."""
    run = Run(path=trained)
    source, text = run.measured()
    codes = torch.zeros(*text.tokens.shape, run.crosscoder.cfg.d_sae)
    for part in harvest(source, text):
        own = torch.zeros(*part.text.mask.shape, codes.shape[-1])
        own[part.text.mask] = run.crosscoder.encode(part.rows).detach()
        codes[part.index] = own
    return codes, text


def some_latents(folder) -> tuple[int, ...]:
    """Three that are active on a few percent of the tokens, so that there are windows without."""
    rate = Measurement.load(folder).latents.firing.rate
    return tuple((rate - 0.04).abs().argsort()[:3].tolist())


def rows(path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_delphi_gets_every_code_of_the_text(trained, tmp_path, dense):
    Handoff(run=str(trained), to="delphi", output=str(tmp_path / "out"))()
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


def test_dashboards_count_over_the_whole_text(trained, tmp_path, dense, capsys):
    Handoff(run=str(trained), to="sae-dashboard", output=str(tmp_path / "out"), model_id="m")()
    assert "batch-0.json" in capsys.readouterr().out
    codes, text = dense
    batch = json.loads((tmp_path / "out/batch-0.json").read_text())
    skipped = json.loads((tmp_path / "out/skipped_indexes.json").read_text())["skipped_indexes"]
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("m", 1, "tl-crosscoder")
    shown = [f["feature_index"] for f in batch["features"]]
    assert sorted([*shown, *skipped]) == list(range(40))
    decoder = Run(path=trained).crosscoder.decoder("finetuned")
    with ExampleDatabase.open(trained / "examples.sqlite") as database:
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


def test_neuronpedia_gets_rows_that_belong_together(run_folder, tmp_path):
    for name in ("one", "two"):
        Handoff(
            run=str(run_folder), to="neuronpedia", output=str(tmp_path / name), latents=(3, 5, 8)
        )()
    source = tmp_path / "one/taboo/1-tl-crosscoder"
    features, activations = (
        rows(source / kind / "batch-0.jsonl.gz") for kind in ("features", "activations")
    )
    about = {
        name: json.loads((source / f"{name}.jsonl").read_text())
        for name in ("release", "model", "sourceset", "source")
    }
    keys = {(f["modelId"], f["layer"], f["index"]) for f in features}
    assert keys == {("taboo", "1-tl-crosscoder", j) for j in "358"}
    assert {(a["modelId"], a["layer"], a["index"]) for a in activations} == keys
    assert len({a["id"] for a in activations}) == len(activations)
    assert {len(a["id"]) for a in activations} == {25}
    assert about["source"]["id"] == "1-tl-crosscoder"
    assert about["sourceset"]["name"] == about["source"]["setName"] == features[0]["sourceSetName"]
    assert about["sourceset"]["releaseName"] == about["release"]["name"]
    assert about["model"]["id"] == "taboo"
    for a in activations:
        assert len(a["tokens"]) == len(a["values"])
        assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
    # The same run is the same bytes.
    for path in source.rglob("*.gz"):
        assert (
            path.read_bytes()
            == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
        )


def test_bad_names_and_folders_are_refused_before_any_work(trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    ask: dict[str, Any] = {"run": str(trained), "to": "neuronpedia"}
    with pytest.raises(ValueError, match="is not an empty folder"):
        Handoff(**ask, output=str(tmp_path / "full"))()
    with pytest.raises(ValueError, match="'a b' is not a name on Neuronpedia"):
        Handoff(**ask, output=str(tmp_path / "new"), set_name="a b")()
    with pytest.raises(ValueError, match=r"site 'other' .* has \['base', 'finetuned'\]"):
        Handoff(**ask, output=str(tmp_path / "new"), site="other")()
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


def test_the_judge_asks_only_when_told_to_and_never_twice(run_folder, server, tmp_path, capsys):
    latents = some_latents(run_folder)
    ask: dict[str, Any] = {
        "run": str(run_folder), "model": "rule", "base_url": server.url,
        "latents": (*latents, latents[0]), "n_active": 6, "n_inactive": 6, "n_per_request": 4,
    }  # fmt: skip
    Judge(**ask)()
    printed = capsys.readouterr().out
    n_asked = int(printed.split()[0])
    assert f"requests to rule; 0 are answered already, {n_asked} would be sent" in printed
    assert "Nothing was sent" in printed
    assert server.requests == []
    assert not (run_folder / "judge_cache.sqlite").exists()

    Judge(**ask, send=True)()
    n_sent = len(server.requests)
    judged = Judged.load(run_folder / "judged.json")
    # 3 names, and the windows of each latent, 4 a request, by two explanations.
    n_windows = [row.n_active + row.n_inactive for row in judged.rows]
    assert n_asked == 3 + 2 * sum(-(-n // 4) for n in n_windows)
    # Two explanations that are the same word make one request of two.
    words = {row.explanation for row in judged.rows}
    assert n_sent == n_asked if len(words) == 3 else n_sent < n_asked
    printed = capsys.readouterr().out
    for row in judged.rows:
        assert min(row.n_active, row.n_inactive) > 3
        assert row.n_read == row.n_read_control == row.n_active + row.n_inactive
        assert row.explanation == f"the word '{row.name}'"
        assert row.control_of in {r.latent for r in judged.rows} - {row.latent}
        assert f"latent {row.latent}" in printed

    Judge(**ask, send=True)()
    Judge(**ask)()
    assert "would be sent, with about 0 tokens in" in capsys.readouterr().out
    assert len(server.requests) == n_sent
    assert repr(Judged.load(run_folder / "judged.json")) == repr(judged)

    # Neuronpedia gets what the judge said.
    Handoff(run=str(run_folder), to="neuronpedia", output=str(tmp_path / "out"))()
    (path,) = (tmp_path / "out").rglob("explanations/batch-0.jsonl.gz")
    said = {row["index"]: row["description"] for row in rows(path)}
    assert said == {str(r.latent): f"{r.name}: {r.explanation}" for r in judged.rows}


def test_names_and_scores_come_from_other_contexts(run_folder, server):
    Judge(
        run=str(run_folder), model="rule", base_url=server.url, n=2, n_active=4, n_inactive=4,
        send=True,
    )()  # fmt: skip
    shown = [r["messages"][-1]["content"] for r in server.requests]
    names = [s for s in shown if not s.startswith("Explanation")]
    windows = [line.split(": ", 1)[1] for s in shown if s.startswith("Explanation")
               for line in s.splitlines()[1:]]  # fmt: skip
    unmarked = "\n".join(names).replace("<<", "").replace(">>", "")
    assert windows
    assert not [w for w in windows if w in unmarked]
