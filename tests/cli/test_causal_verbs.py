"""The verbs `patch`, `ablate` and `steer` on one small run, and what a run's folder says."""

import json
import math
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from cli.small_run import error_of, printed
from safetensors.torch import load_file

from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.latents import rank_latents
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.cli.main import main
from tl_crosscoder.config.causal import AttributionQuestion, LatentsQuestion
from tl_crosscoder.interventions.attribution_result import Attribution
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.interventions.waterfall import Waterfall
from tl_crosscoder.report.causes import causes_of
from tl_crosscoder.report.figures import run_figures
from tl_crosscoder.run.attribution import (
    behaviours_of,
    for_tests,
    half_of,
    predictions_of,
    prompts_of,
    ranking_at_hand,
)
from tl_crosscoder.run.run import Run

FEW = ["--n-prompts", "2", "--n-random", "3", "--n-matched", "2"]


@pytest.fixture(scope="module")
def top(run) -> list[int]:
    return rank_latents(Measurement.load(run).latents, n=30).latents


@pytest.fixture(scope="module")
def question(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("behaviour") / "hints.jsonl"
    ask = [{"role": "user", "content": "Give me a hint."}]
    line = {"messages": ask, "completions": ["Think of something that", "It"], "ends_turn": False}
    path.write_text(json.dumps(line))
    return str(path)


def test_attribute_shares_out_the_change_and_says_what_passes(run, capsys):
    out = printed(capsys, "attribute", run, "--n-steps", 8, "--n", 3)
    found, measured = Attribution.load(run), Waterfall.load(run / "waterfall.json")
    assert abs(found.residual) < 0.05 * found.change
    assert f"residual {found.share(found.residual):+.1%}." in " ".join(out.split())
    assert re.findall(r"^ +\d +(\d+) ", out, re.MULTILINE)[:3] == [*map(str, found.ranking(3))]
    assert (found.n_steps, found.text.part) == (8, "documents for ranking")
    whole, reachable, latents, *first = measured.rows
    assert whole.share == reachable.reachable_share == 1
    assert whole.kl > reachable.kl > latents.kl > 0
    assert [row.n_latents for row in first] == [1, 3, 10, 30]
    assert measured.text["part"] == "documents for tests"
    assert "passes this hook, of which all latents" in " ".join(out.split())
    # From now on it is the order of the run: in tables, the report and names from a judge.
    table = printed(capsys, "analyze", run, "--by", "attribution", "--n", 3)
    assert re.findall(r"^ +\d +(\d+) ", table, re.MULTILINE) == [*map(str, found.ranking(3))]
    ranking = ranking_at_hand(Run(path=run), n=3)
    assert (ranking.order, ranking.latents) == ("attribution", found.ranking(3))


def test_changes_are_printed_kept_and_come_first(run, capsys):
    out = printed(capsys, "changes", run, "--n-prompts", 20, "--n-random", 3)
    found = Changes.load(run / "changes.json")
    assert out.startswith("What changed in predictions of response and text tokens: ")
    assert next(iter(found.texts)) == "documents for ranking"
    assert found.nats > 0
    again = printed(capsys, "analyze", run)
    assert again.startswith("What changed\n")
    assert " ".join(found.lines()[0].split()) in " ".join(again.split())
    assert again.index("passes this hook") < again.index("FVE")


def test_latents_are_ranked_on_other_documents_than_they_are_tested_on(run):
    opened, question = Run(path=run), AttributionQuestion(n_prompts=1000)
    explained = [predictions_of(opened, question, half=half) for half in (0, 1)]
    chats = prompts_of(opened, LatentsQuestion(n_prompts=1000), half=1)
    ids = [{tuple(row) for row in text.tokens.tolist()} for text in (explained[0].text, chats)]
    assert all(ids)
    assert not ids[0] & ids[1]
    # What is explained is of plain documents, too, and of few of them from all over the text.
    assert explained[0].kind == "response and text"
    assert len(explained[0].text) + len(explained[1].text) == len(opened.documents())
    few = predictions_of(opened, AttributionQuestion(n_prompts=2), half=0)
    assert torch.equal(few.text.tokens[0], explained[0].text.tokens[0])
    assert not torch.equal(few.text.tokens[1], explained[0].text.tokens[1])
    behaviour = behaviours_of(opened)[0]
    prompts = [{str(q.prompt) for q in half_of(behaviour, opened, i).questions} for i in (0, 1)]
    assert not prompts[0] & prompts[1]
    assert for_tests(behaviour, opened).n_prompts == behaviour.n_prompts


def test_patch_prints_the_table_and_leaves_it(run, top, capsys):
    out = printed(capsys, "patch", run, "--n-prompts", 2, "--latents", *top[:2])
    result = PatchingResult.load(run / "patching.json")
    chosen = result.row("chosen")
    assert (chosen.n_latents, chosen.n_prompts) == (2, 2)
    assert f"{chosen.kl:.3f} [" in out
    assert f"{chosen.recovery:.0%} [" in out
    assert "KL recovery on response tokens" in out
    assert out.rstrip().endswith(f"Saved in {run / 'patching.json'}")


def test_ablate_projects_the_ranked_latents_out(run, top, question, capsys):
    args = ["--mode", "project", "--behaviour", question, "--null", run, "--order", "score"]
    out = printed(capsys, "ablate", run, *FEW, *args)
    for kind, n_prompts in {"predictions": 2, "behaviour_hints": 1}.items():
        result = CausalTest.load(run / f"ablation_{kind}.json")
        sizes = [n for n in (3, 10, 30) if n <= len(top)]
        assert result.sets == {f"top {n}": top[:n] for n in sizes}
        assert {row.test for row in result.rows} == {"necessity"}
        assert all(math.isfinite(row.null_mean) for row in result.rows)
        assert (result.n_prompts, result.n_random, result.n_matched) == (n_prompts, 3, 2)
    assert "Necessity: hints" in out
    assert "Controls: 3 of each kind, 2 sets" in " ".join(out.split())
    assert "top 10" in out
    assert "ablation_behaviour_hints.json, ablation_predictions.json" in out


def test_each_of_several_behaviours_has_its_rows_and_what_does_not_differ_is_named(
    run, top, question, capsys
):
    folder = Path(question).parent / "several"
    folder.mkdir()
    ask = {"messages": [{"role": "user", "content": "Give me a hint."}]}
    for name, completion in {"says-it": "Think of something that", "says-zebra": "zebra"}.items():
        line = {**ask, "completions": [completion], "ends_turn": False}
        (folder / f"{name}.jsonl").write_text(json.dumps(line))
    (run / "ablation_behaviour.json").write_text("of an older version")
    few = [*FEW, "--controls", "random", "--latents", top[0]]
    out = " ".join(printed(capsys, "ablate", run, *few, "--behaviour", folder, question).split())
    assert not (run / "ablation_behaviour.json").exists()
    for name in ("predictions of response tokens", "says it", "hints"):
        assert f"Necessity: {name} (" in out
    assert "Base and fine-tuned model do not differ in 'says zebra'" in out
    assert out.count("Share of the change from base to fine-tuned model that is removed") == 1
    silent = CausalTest.load(run / "ablation_behaviour_says-zebra.json")
    assert (silent.rows, silent.effect) == ((), "says zebra")
    assert "ablation_behaviour_says-it_necessity" in run_figures(run)
    causes = causes_of(run)
    assert {test.effect for test, _ in causes.tested if test.n_prompts == 1} >= {"says it", "hints"}
    assert silent.note in [section.title for section in causes.sections]
    args = "attribute", run, "--goal", "behaviour", "--behaviour", folder
    assert "one is attributed at a time" in error_of(capsys, *args)


def test_ablate_exports_and_shows_what_the_models_write(run, top, question, tmp_path, capsys):
    args = [run, *FEW, "--latents", *top[:2], "--behaviour", question]
    prompts = ["--prompts", "Give me a hint.", "Hello!"]
    out = printed(capsys, "ablate", *args, "--export", tmp_path / "new", *prompts)
    assert CausalTest.load(run / "ablation_behaviour_hints.json").sets == {"chosen": top[:2]}
    facts = json.loads((tmp_path / "new" / "mitigation.json").read_text())
    assert (facts["mode"], facts["latents"]) == ("delta", top[:2])
    assert load_file(tmp_path / "new" / "mitigation.safetensors")["directions"].shape == (2, 96)
    assert "The mitigation by 2 latents is in" in out
    assert f"KL to the exact ablation {facts['loss']['kl']:.4f}" in " ".join(out.split())
    for said in ("> Give me a hint.", "> Hello!"):
        block = out[out.index(said) :].splitlines()
        names = [line.split()[0] for line in block if line.startswith("  ")]
        assert [n for n in names if n in ("base", "finetuned", "ablated")][:3] == [
            "base", "finetuned", "ablated",
        ]  # fmt: skip


def test_steer_inserts_and_steers_for_the_planted_behaviour(run, top, capsys):
    args = ["--strengths", 0.5, "--latents", top[0], "--prompts", "Give me a hint.", "--controls",
            "random"]  # fmt: skip
    out = printed(capsys, "steer", run, *FEW, *args)
    predictions, behaviour = (
        CausalTest.load(run / f"sufficiency_{kind}.json")
        for kind in ("predictions", "behaviour_false-answer")
    )
    # Steering is the same at every token, so it is scored by the behaviour alone.
    assert [row.test for row in predictions.rows] == ["insert"]
    assert [(r.test, r.strength) for r in behaviour.rows if r.test == "steer"] == [("steer", 0.5)]
    assert behaviour.effect == "false answer"
    row = behaviour.rows[0]
    assert row.base < 0.2 < 0.8 < row.finetuned
    assert "Sufficiency by steering: false answer" in out
    assert "Sufficiency by steering: true answer" in out
    assert f"latent {top[0]} x 0.5  " in out


def test_analyze_prints_the_ranking_and_the_examples_are_there(run, top, capsys):
    out = printed(capsys, "analyze", run)
    assert re.search(rf"^ +1 +{top[0]} ", out, re.MULTILINE)
    with ExampleDatabase.open(run / "examples.sqlite") as database:
        example = database.latent(top[0])[0]
        assert example.activations[example.at] == example.value > 0
        assert example.token == example.tokens[example.at]


def test_analyze_shows_one_latent_searches_and_writes_a_table(run, top, tmp_path, capsys):
    one = printed(capsys, "analyze", run, "--latent", top[0])
    assert one.startswith(f"Latent {top[0]}\n")
    for heading in ("  active on", "Direct effect", "Patchscope", "  largest "):
        assert f"\n{heading}" in one
    found = printed(capsys, "analyze", run, "--search", "Velmar", "--n", 3)
    assert found.count("      ") >= 3
    assert len(re.findall(r"\[[^]]*\]", found)) >= 3
    assert "No latent has 'xyzzy'" in printed(capsys, "analyze", run, "--search", "xyzzy")
    table = printed(capsys, "analyze", run, "--by", "nu", "--toward", "base", "--n", 4)
    assert table.startswith("Ranking: order nu, toward base\n")
    assert re.findall(r"^  (\d) ", table, re.MULTILINE)[:4] == [*"1234"]
    path = tmp_path / "latents.parquet"
    assert "48 latents with" in printed(capsys, "analyze", run, "--table", path)
    assert len(pd.read_parquet(path)) == 48
    assert main(["analyze", str(run), "--latent", "0", "--text", "x.txt"]) == 2
    assert "leave --text out" in capsys.readouterr().err


def test_analyze_compares_dictionaries_and_sides(run, capsys):
    assert "DecoupledPairs: threshold 0.9" in printed(capsys, "analyze", run, "--decoupled")
    same = printed(capsys, "analyze", run, "--seeds", run)
    assert same.splitlines()[-1].split()[3:] == ["1.000", "1.000", "1.000"]
    assert "ce_loss_score" in printed(capsys, "analyze", run, "--evals")


def test_baselines_need_no_dictionary(run, capsys):
    few = ["--n-prompts", 2, "--n-random", 2, "--controls", "random", "--n-texts", 2]
    out = printed(capsys, "baselines", run, *few, "--strengths", 1)
    for part in ("ADL, mean", "PC 1 ", "Tokens that the mean difference promotes"):
        assert part in out
    titles = " ".join(section.title for section in causes_of(run).sections)
    assert "Without a dictionary. Necessity: false answer" in titles
    for said in ("Diff Mining: tokens among", "What the fine-tuned model writes", "What amplified"):
        assert said in out
        assert said in titles


def test_curves_compare_orders_and_methods_at_equal_numbers(run, top, question, capsys):
    few = ["--n-prompts", 2, "--n-random", 2, "--n-matched", 2, "--sizes", 1, 3, 500]
    args = [*few, "--orders", "score", "nu", "--methods", "pca", "adl", "--behaviour", question]
    out = printed(capsys, "curves", run, *args)
    assert "Necessity, by number: hints" in out
    assert "Sufficiency by insertion, by number: hints" in out
    curves = CausalTest.load(run / "curves_behaviour_hints.json")
    names = ["score", "nu", "pca", "adl"]
    of_first = [(r.latents, r.n_latents) for r in curves.rows if r.test == "insert"]
    assert set(of_first) == {*((name, n) for name in names for n in (1, 3)), ("all latents", 48)}
    assert {name: found[:3] for name, found in curves.sets.items()}["score"] == top[:3]
    assert {r.latents: r.strongest in ("covariance", "matched") for r in curves.rows} == {
        **dict.fromkeys(names, False), "all latents": False, "score": True,
    }  # fmt: skip
    # One ceiling for all: the whole activation.
    assert len({(r.test, r.ceiling) for r in curves.rows}) == 2
    figures = run_figures(run)
    for kind in ("necessity", "insert", "cost"):
        assert f"curves_behaviour_hints_{kind}" in figures
    titles = [section.title for section in causes_of(run).sections]
    assert any(title.startswith("Necessity, by number: hints") for title in titles)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["patch", "RUN", "--latents", "1", "48"], "latents [48] are out of range or named twice"),
        (["ablate", "RUN", "--latents", "48"], "numbered 0 to 47"),
        (["steer", "RUN", "--latents", "-1"], "latents is (-1,); it must be 0 or more"),
        (["patch", "NONE"], "is not a run: there is no such folder"),
        (["steer", "NONE"], "is not a run: there is no such folder"),
        (["ablate", "RUN", "--behaviour", "none.jsonl"], "none.jsonl is not there: a behaviour is"),
        (["ablate", "RUN", "--export", "RUN"], "is not an empty folder: choose another"),
        (["ablate", "RUN", "--text", "none.txt"], "no text file or folder"),
        (["steer", "RUN", "--n-random", "0"], "n_random is 0; it must be above 0"),
        (["ablate", "RUN", "--max-ce-cost", "-1"], "max_ce_cost is -1.0; it must be above 0"),
        (["curves", "RUN", "--n-random", "1", "--sizes", "0"], "sizes is (0,); it must be above 0"),
        (["curves", "RUN", "--orders", "score", "--methods", "sae"], "name its folder (--sae)"),
        (["patch", "RUN", "--device", "cuda:99"], "device 'cuda:99' is not there"),
    ],
)
def test_bad_input_is_refused_in_one_paragraph(
    run, tmp_path, capsys, args: list[str], message: str
):
    before = {p: p.read_bytes() for p in run.iterdir()}
    folders: dict[str, str] = {"RUN": str(run), "NONE": str(tmp_path / "none")}
    args = [folders.get(a, a) for a in args]
    few = [] if "--n-random" in args else FEW
    assert main([*args, *(few if args[0] != "patch" else FEW[:2])]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert {p: p.read_bytes() for p in run.iterdir()} == before


def test_a_folder_knows_its_organism_by_the_whole_name(run, tmp_path):
    assert Run(path=run).organism() == "false-fact"
    shutil.copytree(run, tmp_path / "copy")
    config = tmp_path / "copy" / "cfg.json"
    config.write_text(config.read_text().replace("tl_crosscoder/false-fact", "false-fact"))
    other = Run(path=tmp_path / "copy")
    assert other.crosscoder.sites[-1].label == "false-fact"
    assert other.organism() is None


def test_a_folder_without_held_out_text_asks_for_one(run, tmp_path, capsys):
    names = ("cfg.json", "sae_weights.safetensors", "runner_cfg.json", "analysis.json",
             "analysis.safetensors")  # fmt: skip
    for name in names:
        shutil.copy(run / name, tmp_path)
    assert main(["patch", str(tmp_path)]) == 2
    assert "keeps no held-out text" in capsys.readouterr().err
