"""The verb `null`: a pair that should show nothing, and the floor that it gives."""

import json
import math
import shutil
from dataclasses import replace

import pytest
from cli.small_run import HOOK, PAIR, error_of, flags, printed
from report.result_rows import causal_row

from tl_crosscoder import Crosscoder, ModelPair, RunConfig, demo, load_documents, preset
from tl_crosscoder.config.null import NullConfig
from tl_crosscoder.demo import HARDLY, verdicts_of
from tl_crosscoder.interventions.attribution_result import Attribution
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import unchanged
from tl_crosscoder.interventions.latent_edits import ablation
from tl_crosscoder.models.lora import LoraTrained
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.run.attribution import RANKING, TESTS, behaviours_of, half_of
from tl_crosscoder.run.floor import THE_PAIR, Floor, floor_of, measured_floor
from tl_crosscoder.run.null import ADAPTER_NAME, SAMPLES_NAME, null_pair, null_run
from tl_crosscoder.run.own_samples import prompt_documents
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

FEW = {"n_steps": 3, "n_samples": 10, "batch_size": 4, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def nulled(run, tmp_path_factory) -> Run:
    """A copy of the run, with a null pair of each kind."""
    folder = tmp_path_factory.mktemp("nulled") / "run"
    shutil.copytree(run, folder)
    opened = Run(path=folder)
    null_run(opened, NullConfig(**FEW))
    null_run(opened, NullConfig(kind="identical"))
    return opened


@pytest.fixture(scope="module")
def floor(nulled) -> Floor:
    found = floor_of(nulled)
    assert found is not None
    return found


def test_identical_models_are_exact_zeros_and_the_answer_clears_both_floors(floor):
    assert [row.pair for row in floor.rows] == [
        THE_PAIR, "base against itself", "base fine-tuned on its own samples",
    ]  # fmt: skip
    pair, identical, own = floor.rows
    for name in ("whole_kl", "whole_kl_high", "reachable_kl", "largest_latent", "n_over_bar"):
        assert getattr(identical, name) == 0
    assert identical.weights_moved == 0 < own.weights_moved < pair.weights_moved
    assert 0 < own.whole_kl_high < pair.whole_kl_low
    assert 0 < own.largest_latent < pair.largest_latent
    assert floor.is_cleared
    assert floor.warning() == ""
    assert str(floor).startswith("The answer clears the noise floor.")
    assert floor.lines()[1].startswith("Floor (base fine-tuned on its own samples): KL ")
    # Three steps are no fine-tune.
    assert floor.lines()[1].endswith("take a larger --lr or more --n-steps.")


def test_latents_over_the_bar_are_those_with_a_share_of_what_the_pair_carries(nulled, floor):
    found = Attribution.load(nulled.path)
    carried = found.latents / found.text.n_predicted
    assert floor.bar == pytest.approx(0.01 * found.change / found.text.n_predicted)
    assert floor.pair.n_over_bar == int((carried >= floor.bar).sum()) > 0
    assert floor.pair.largest_latent == pytest.approx(carried.max().item())


def test_where_a_null_shows_as_much_the_first_line_says_so(floor):
    same = replace(floor.pair, pair=floor.nulls[1].pair)
    found = replace(floor, rows=(floor.pair, floor.nulls[0], same))
    assert not found.is_cleared
    assert str(found).startswith("The answer does NOT clear the noise floor: KL is 0.")
    assert [fault.partition(" is ")[0] for fault in found.faults()] == ["KL", "the largest latent"]
    # A pair of which no change is claimed is above a null without any, and below one with some.
    pair, null = (replace(row, n_changes=0, largest_change=0.0) for row in floor.rows[:2])
    assert replace(floor, rows=(pair, null)).is_cleared
    some = replace(null, n_changes=1, largest_change=0.2)
    (fault,) = replace(floor, rows=(pair, some)).faults()
    assert fault == "the largest change is 0 nats a token, and 0.2 of the base against itself"


def test_a_null_that_is_broken_says_so(nulled, floor):
    null = Run(path=nulled.path / "null/self", loaded=None)
    trained = LoraTrained.load(nulled.path / "null" / ADAPTER_NAME)
    broken = replace(trained, ce_after=trained.ce_before + 0.6)
    found = measured_floor(nulled, null, kind="self", trained=broken)
    assert "this null is a broken model (the cross-entropy of its own text rose by 0.6" in str(
        found.nulls[0].flag
    )
    again = measured_floor(nulled, null, kind="self", trained=trained)
    assert sorted(map(str, again.rows)) == sorted(map(str, floor.rows))


def test_the_fine_tune_is_like_the_runs_and_of_what_the_base_wrote(nulled):
    folder = nulled.path / "null"
    made, theirs = (
        json.loads((path / "adapter_config.json").read_text())
        for path in (folder / ADAPTER_NAME, organism("false-fact").adapter)
    )
    for key in ("r", "lora_alpha", "base_model_name_or_path"):
        assert made[key] == theirs[key]
    assert {*made["target_modules"]} == {*theirs["target_modules"]}
    samples = load_documents(folder / SAMPLES_NAME)
    assert {row["source"] for row in samples} == {"contrastive-base"}
    # Turns that end: a model that never sees an end unlearns it.
    assert nulled.models.tokenizer.eos_token_id in {row["input_ids"][-1] for row in samples}
    trained = LoraTrained.load(folder / ADAPTER_NAME)
    assert (trained.n_steps, trained.rank) == (3, 8)
    assert math.isfinite(trained.ce_after)


def test_prompts_are_of_documents_that_are_not_measured_on_and_come_again():
    documents = [{"text": f"Text {i}."} for i in range(6)]
    config = RunConfig(output="o")
    found = prompt_documents(config, documents, 9, measured=documents[:2])
    assert len(found) == 9
    assert {d["text"] for d in found} == {d["text"] for d in documents[2:]}
    with pytest.raises(ValueError, match="the run is measured on all of its documents"):
        prompt_documents(config, documents, 9, measured=documents)


def test_it_goes_on_with_resume_alone_and_makes_nothing_again(nulled, capsys):
    before = {p: p.read_bytes() for p in nulled.path.rglob("*.safetensors")}
    args = ["null", nulled.path, *flags(FEW)]
    assert "already holds a null pair of this kind" in error_of(capsys, *args)
    other = error_of(capsys, *args, "--resume", "--lr", "0.5")
    assert "was begun with other settings: lr (0.001 there, 0.5 now)" in other
    out = printed(capsys, *args, "--resume")
    assert out.startswith("The answer clears the noise floor.")
    assert {p: p.read_bytes() for p in nulled.path.rglob("*.safetensors")} == before


def test_its_dictionary_is_a_null_for_causal_tests(nulled):
    null = Crosscoder.load(nulled.path / "null/self")
    assert [s.hook_name for s in null.sites] == [s.hook_name for s in nulled.crosscoder.sites]
    assert null.sites[1].adapter == str(nulled.path / "null" / ADAPTER_NAME)
    assert not nulled.crosscoder.W_dec.equal(null.W_dec)


def test_a_behaviour_in_which_models_do_not_differ_is_a_verdict(nulled):
    """The demo's test on a null pair: named, and no error."""
    null = Run(path=nulled.path / "null/identical")
    planted = organism("false-fact").planted_questions
    latents = null.measurement().latents.n_active.argsort(descending=True)[:3].tolist()
    for chosen, why in ((latents, "Base and fine-tuned model do not"), ([], "no latent carries")):
        verdicts = verdicts_of(null, {"ranking": chosen}, behaviours=planted)
        assert len(verdicts) == 2
        assert not any(v.is_found for v in verdicts)
        assert all(f": {why}" in str(v) for v in verdicts)


def test_the_set_that_undoes_most_on_other_prompts_is_tested(nulled):
    """By the probability on half of the prompts, of which the test asks none."""
    latents = nulled.measurement().latents.n_active.argsort(descending=True)[:9].tolist()
    sets = {"change 1": latents[:1], "ranking": latents, "change 2": latents[3:5]}
    (behaviour, *_), ctx = (
        behaviours_of(nulled),
        InterventionContext.of(nulled.models, nulled.crosscoder),
    )
    half, rest = (half_of(behaviour, nulled, which) for which in (RANKING, TESTS))
    assert not [question for question in half.questions if question in rest.questions]
    edits = [unchanged(ctx.base), *(ablation(ctx, ids) for ids in sets.values())]
    base, *each = half.scores(ctx, edits).mean(dim=1).tolist()
    nearest = min(zip(each, sets, strict=True), key=lambda pair: abs(pair[0] - base))[1]
    verdict = verdicts_of(nulled, {**sets, "change 3": []})[0]
    assert (verdict.latents, verdict.n_latents) == (nearest, len(sets[nearest]))
    assert verdict.finetuned == pytest.approx(
        rest.scores(ctx, [unchanged(ctx.finetuned)]).mean().item()
    )
    said = {"ranking": "Ablating the first 9 latents of the ranking removes",
            "change 1": "Ablating the 1 latent of change 1 removes"}  # fmt: skip
    for name, words in said.items():
        assert words in str(replace(verdict, latents=name, n_latents=len(sets[name])))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        # What a neutral fine-tune does: from 98.7 to 97.8 %, and a twentieth of that removed.
        ({"base": 0.987, "finetuned": 0.978, "share": 0.053, "share_low": 0.035}, HARDLY),
        ({"base": 0.987, "finetuned": 0.93}, ""),
        ({"p_control": 0.06}, "controls do as much"),
        ({"control_high": 0.8}, "controls do as much"),
        ({"share_low": 0.0}, "the interval holds 0"),
        ({"flag": "broken model"}, "broken model"),
    ],
)
def test_a_verdict_says_why_it_proves_nothing(changes, reason):
    assert demo._reason(causal_row(**changes), explains=True) == reason
    assert demo._reason(causal_row(**changes), explains=False).startswith("the dictionary explains")


def test_models_in_4_bits_are_refused_before_anything_is_trained(text, tmp_path, capsys):
    args = ["train", *PAIR, *HOOK, "--text", text, "--output", tmp_path / "run", "--dtype", "nf4"]
    error = error_of(capsys, *args, "--null", "self")
    assert "4 bits (nf4), in which the base is not fine-tuned. `identical`" in error
    assert not (tmp_path / "run").exists()


def test_models_in_memory_have_a_null_that_needs_no_fine_tune(nulled, text, tmp_path):
    """Under names that nothing is found by, and a text that is not recorded."""
    models = ModelPair(*nulled.models.models, hook_name=HOOK[1], model_names=["./mine", "./ft"])
    documents = load_documents(text)
    config = RunConfig(
        output=str(tmp_path / "run"), hook_name=HOOK[1], preset=preset("batchtopk", k=4), d_sae=32,
        n_tokens=128, n_measured_tokens=128, n_calibration_tokens=64, context_size=32,
    )  # fmt: skip
    run = train(config, models=models, text=documents)
    with pytest.raises(ValueError, match=r"does not record its text.* give it again with text"):
        null_run(run, NullConfig(kind="identical"))
    with pytest.raises(ValueError, match=r"'./mine' cannot be fine-tuned: .*exist.* `identical`"):
        null_run(run, text=documents)
    assert not (run.path / "null" / SAMPLES_NAME).exists()
    pair = null_pair(run, None)
    assert pair.models[0] is pair.models[1] is models.models[0]
    assert [site.name for site in pair.sites] == ["base", "finetuned"]
    assert {site.model_name for site in pair.sites} == {"./mine"}
