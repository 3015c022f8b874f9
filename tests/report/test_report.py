"""What a report says, and of which runs it can be made; in a browser: `test_report_browser`."""

import base64
import gzip
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from report.report_runs import DIFFERENCE, HOOK, HOSTILE, PAIR, small_run
from report.result_rows import causal_row, change_row, changes_result, patching_row

from tl_crosscoder import ModelPair, TrainConfig, Trainer, load_diff, measure, preset
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.lens import Readout
from tl_crosscoder.cli.report import Report
from tl_crosscoder.config.causal import AttributionQuestion
from tl_crosscoder.data.text import write_documents
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.changes_result import NONE_FOUND
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.models.pair import planned_sites
from tl_crosscoder.report.causes import causes_of
from tl_crosscoder.report.html import ReportSettings, SampleSettings, report
from tl_crosscoder.report.html.data import ReportData, collect
from tl_crosscoder.report.html.page import page
from tl_crosscoder.run.attribution import attribute_run
from tl_crosscoder.run.run import Run, save_measurement

FEW = SampleSettings(prompts=("Hello!",), strengths=(1.0,), max_new_tokens=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(path=small_run(tmp_path_factory.getbasetemp(), *PAIR))


@pytest.fixture(scope="module")
def data(run) -> ReportData:
    samples = replace(FEW, prompts=(), n_prompts=3)
    return collect(run, ReportSettings(n_latents=6, samples=samples))


@pytest.fixture
def folder(run, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(run.path, tmp_path / "run"))


def shown(html: str) -> str:
    """Words of a page before its scripts."""
    words = re.sub(
        r"<(style|script).*?</\1>|<[^>]*>", "", html[: html.index('id="data"')], flags=re.S
    )
    return " ".join(words.split())


def test_it_begins_with_the_changes_in_both_models_words(folder, data):
    first = data.latents[0]["latent"]
    rows = change_row(latents=(first, 10_000)), change_row(place=2, base_text=HOSTILE, raised=())
    doubtful = change_row(place=3, doubt="controls do as much")
    changes_result(*rows, doubtful).save(folder / "changes.json")
    html = page(collect(Run(path=folder), ReportSettings(n_latents=6, models=False)), {})
    words = shown(html)
    assert (
        "48 % of the change: after Is it the moon? the base writes Yes, it is the moon., the "
        "fine-tune I cannot tell you that."
    ) in words
    undone = f"Ablating latents {first}, 10000 undoes 86 % [77, 93] of it (shuffled controls 3 %)"
    assert undone in words
    assert "costs 0.0012 nats a token on neutral text. Likelier: cannot Less likely: Yes" in words
    assert f'<a href="#latent-{first}">{first}</a>, 10000 undoes' in html
    assert "1 group of latents is found again and not counted: controls do as much." in words
    assert words.index("48 % of the change") < words.index("A dictionary of")
    assert HOSTILE not in html
    assert "the base writes &lt;/script&gt;&lt;img src=x" in re.sub('<q class="base">', "", html)
    changes_result().save(folder / "changes.json")
    nothing = page(collect(Run(path=folder), ReportSettings(n_latents=6, models=False)), {})
    assert '<ol class="changes">' not in nothing
    assert NONE_FOUND in shown(nothing)


def test_latents_are_in_the_order_of_an_attribution_where_the_folder_has_one(folder):
    ranked = attribute_run(Run(path=folder), AttributionQuestion(n_prompts=4, n_steps=1))
    data = collect(Run(path=folder), ReportSettings(n_latents=3, models=False))
    assert data.order == "attribution"
    assert [record["latent"] for record in data.latents] == ranked.ranking(3)
    first = data.latents[0]["ranked"]
    assert first["attribution"] == pytest.approx(ranked.rows(1)[0].attribution, rel=1e-3)


def test_records_are_the_measures_of_the_first_latents(run, data):
    latents = run.measurement().latents
    assert len(data.latents) == 6
    scores = [record["ranked"]["score"] for record in data.latents]
    assert scores == sorted(scores, reverse=True)
    with ExampleDatabase.open(run.path / "examples.sqlite") as database:
        for record in data.latents:
            j = record["latent"]
            R = latents.relative_decoder_norm[j].item()
            assert record["ranked"]["relative_decoder_norm"] == pytest.approx(R, rel=1e-3)
            base, finetuned = (norm for _, norm in record["norms"])
            assert finetuned / (base + finetuned) == pytest.approx(R, rel=1e-3)
            assert sum(n for _, n, _ in record["roles"]) == latents.n_active[j]
            strongest = database.latent(j)[0]
            assert record["examples"][0]["value"] == pytest.approx(strongest.value, rel=1e-3)
            assert record["examples"][0]["codes"][record["examples"][0]["at"]] == pytest.approx(
                strongest.value, rel=1e-2
            )
            assert [e["direction"] for e in record["logits"]] == ["base", "finetuned", "difference"]
            assert all(len(e["promoted"]) == len(e["suppressed"]) == 8 for e in record["logits"])
    json.dumps(data.page_data(), allow_nan=False)


def test_the_page_says_the_numbers_and_holds_no_foreign_markup(run, data):
    html = page(data, {})
    r = run.measurement().reconstruction
    words = shown(html)
    assert f"explains {100 * r.fve['base']:.1f} % of the variance of base and" in words
    assert f"{100 * r.difference_share:.1f} % of the variance, and the dictionary explains" in words
    assert f"{r.n_tokens:,} held-out tokens." in words
    assert "has not been tested." in words
    assert "tl-crosscoder patch" in words
    assert any(HOSTILE in [name for name, *_ in record["sources"]] for record in data.latents)
    assert HOSTILE not in html
    assert "<img" not in html
    packed = html[html.index('id="data">') + 10 :].split("</script>", 1)[0]
    content = json.loads(gzip.decompress(base64.b64decode(packed)))
    assert content["latents"] == json.loads(json.dumps(data.latents))
    assert str(run.path) not in html


def test_examples_say_what_fine_tuning_makes_of_each_token(run, data):
    _, text = run.measured()
    records = [example for record in data.latents for example in record["examples"]]
    assert all(len(example["shifts"]) in (0, len(example["tokens"])) for example in records)
    with ExampleDatabase.open(run.path / "examples.sqlite") as database:
        found = database.latent(data.latents[0]["latent"], n=3)
    for example, record in zip(found, records, strict=False):
        context = text.tokens[example.context][None]
        logits = [run.models.logits(context, site=site) for site in ("base", "finetuned")]
        at = example.position
        base, finetuned = (each[0, at - 1].log_softmax(-1)[context[0, at]] for each in logits)
        own = record["shifts"][example.at]
        assert own == (pytest.approx((finetuned - base).item(), abs=0.006) if at else None)
    assert any(abs(shift or 0) > 0.1 for record in records for shift in record["shifts"])


def test_the_effect_on_all_logits_is_counted(run, data):
    crosscoder, latent = run.crosscoder, data.latents[0]["latent"]
    d = crosscoder.decoder(1)[latent] - crosscoder.decoder(0)[latent]
    logits = Readout.of(run.models.models[1]).logits(d[None])[0]
    own = data.latents[0]["logit_histogram"]
    assert sum(own["counts"]) == own["n"] == len(logits)
    ends = logits.min().item(), logits.max().item()
    assert (own["least"], own["most"]) == pytest.approx(ends, rel=0.01)


def test_causes_are_in_the_first_words(data, tmp_path):
    PatchingResult(
        rows=(
            patching_row("base stream", 0.0),
            patching_row("top 3", 0.4, group="chosen", n_latents=3),
            patching_row("top 9", 0.8, group="chosen", n_latents=9),
        ),
        compared=("base", "finetuned"), candidates="none", candidate_latents=(),
    ).save(tmp_path / "patching.json")  # fmt: skip
    about = {"n_prompts": 7, "n_random": 100, "n_matched": 0, "max_ce_cost": 0.5, "sets": {}}
    for kind, effect, unit in (
        ("predictions", "predictions of response tokens", "KL, nats a prompt"),
        ("behaviour", f"hints{HOSTILE}", "probability"),
    ):
        rows = (
            causal_row("top 3"),
            causal_row("top 9", n_latents=9, share=0.5, control_mean=-0.001, flag="broken model"),
        )
        CausalTest(rows=rows, effect=effect, unit=unit, **about).save(
            tmp_path / f"ablation_{kind}.json"
        )
    causes = causes_of(tmp_path)
    html = page(replace(data, causes=causes), {})
    words = shown(html)
    assert "Patching top 9 (9 latents) into the base activation recovers 80 % [70, 90] of" in words
    said = (
        "Ablating top 9 from the fine-tuned model removes 50 % [70, 85] of the change in "
        "“hints&lt;/script&gt;"
    )
    assert said in words
    assert (
        "86 % of what passes this hook; strongest control, shuffled, 0 %, p = 0.03 (at least "
        in words
    )
    assert "neutral text +0.0045 nats" in words
    assert "Not a plain share: broken model." in words
    assert "Broken model: the edit raises the cross-entropy of neutral text beyond the" in words
    assert HOSTILE not in html
    assert "tl-crosscoder steer" in words
    assert "tl-crosscoder ablate;" not in words


def test_a_diff_sae_has_all_but_norms(tmp_path_factory):
    run = Run(path=small_run(tmp_path_factory.getbasetemp(), *DIFFERENCE))
    data = collect(run, ReportSettings(n_latents=3, samples=FEW))
    assert data.compared is None
    assert data.samples is not None
    assert data.texts
    assert [site.name for site in run.models.model_sites] == ["base", "finetuned"]
    assert [e["direction"] for e in data.latents[0]["logits"]] == ["difference"]
    assert data.latents[0]["ranked"]["relative_decoder_norm"] is None
    words = shown(page(data, {}))
    assert "Of the active latents" not in words
    assert "nan" not in words


def test_other_sites_than_a_pair_are_named_and_no_latents_are_said(data):
    none = replace(data, latents=[], compared=("base", "finetuned_2"))
    words = shown(page(none, {}))
    assert "R and classes compare finetuned_2 (as finetuned) with base (as base)" in words
    assert "No latent is active on 10 held-out tokens or more" in words
    assert "as finetuned" not in shown(page(data, {}))


def test_a_single_site_says_what_it_cannot_have(run, tmp_path):
    models = ModelPair.from_sites(planned_sites(["tl_crosscoder/world-base"], HOOK))
    text = run.text(run.documents())[:40]
    config = TrainConfig(d_sae=16, n_tokens=512, batch_size=128, lr_warmup_steps=1)
    how = {"config": config, "recipe": preset("batchtopk", k=4), "output": tmp_path}
    crosscoder = Trainer(models, text, text, **how).fit()
    write_documents(tmp_path / "held_out.jsonl", run.documents())
    save_measurement(
        measure(models, crosscoder, text), tmp_path, text=text, tokenizer=models.tokenizer
    )
    data = collect(Run(path=tmp_path), ReportSettings(n_latents=3, samples=FEW))
    assert data.samples is None
    assert [[e["direction"] for e in r["logits"]] for r in data.latents] == [
        [models.sites[0].name]
    ] * 3
    (missing,) = data.missing.values()
    assert "two sites of one width" in missing
    words = shown(page(data, {}))
    assert "Samples and texts" in words
    assert "What there is in tl_crosscoder/world-base" in words
    view = load_diff(tmp_path, models=models).latent(data.latents[0]["latent"])
    shown_tokens = [token for token, _ in data.latents[0]["logits"][0]["promoted"]]
    assert [row.token for row in view.effects.rows[:8]] == shown_tokens
    assert "No " not in repr(view)
    assert "another model" not in repr(view)
    assert "not in the other" not in repr(view)


def test_latents_without_examples_and_runs_without_models(folder):
    (folder / "examples.sqlite").unlink()
    cfg = (folder / "cfg.json").read_text()
    (folder / "cfg.json").write_text(cfg.replace("tl_crosscoder/world-base", "gone/gone"))
    with pytest.raises(ValueError, match=r"cannot be loaded.*gone.*--no-models"):
        collect(Run(path=folder))
    data = collect(Run(path=folder), ReportSettings(n_latents=5, models=False))
    assert [*data.missing] == ["Effect on the logits, samples, texts", "Examples"]
    assert all(not record["examples"] and not record["logits"] for record in data.latents)
    assert "analyze --fresh" in shown(page(data, {}))


def test_without_a_text_samples_need_one(folder):
    (folder / "held_out.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"--text.*--no-samples"):
        collect(Run(path=folder), ReportSettings(n_latents=2))


def test_the_verb_writes_one_file_and_says_so(folder, capsys):
    Report(dictionary=str(folder), n_latents=3, samples=False)()
    path = folder / "report.html"
    assert re.fullmatch(rf"{path}: \d\.\d MB; opens without a network\n", capsys.readouterr().out)
    html = path.read_text(encoding="utf-8")
    assert 'data-figure="relative_decoder_norm"' in html
    assert html.count('id="plotly"') == 1
    with pytest.raises(ValueError, match=r"must end in \.html"):
        report(folder, output=folder / "report.pdf")
    with pytest.raises(ValueError, match="--prompts are for samples"):
        Report(dictionary=str(folder), prompts=("Hi",), models=False)()
    with pytest.raises(ValueError, match="n_latents is 0"):
        Report(dictionary=str(folder), n_latents=0)()
