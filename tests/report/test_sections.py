"""What the terminal prints of a measurement, of interventions and of samples."""

import math
import re
from dataclasses import replace

import pytest
from analysis.hand_made import RECONSTRUCTION, latent_measures, measurement, sites
from report.result_rows import NAN, causal_result, causal_row, patching_result, patching_row

from tl_crosscoder.analysis.examples import Example
from tl_crosscoder.interventions.causal_rows import CausalTest, causal_sections
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.report.causes import patching_sections
from tl_crosscoder.report.sections import render, samples_text
from tl_crosscoder.results.render import WIDTH, as_text, n_columns


def rendered(examples=(), *, reconstruction=RECONSTRUCTION, names=None, **options) -> str:
    """Five latents: R 0, 0.5, 0.5 (silent), 0.75 and 1, of which the last two are ranked."""
    latents = latent_measures(
        [1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 3.0, 2.0], [20, 1500, 0, 617, 12345]
    )
    made = measurement(latents, examples={4: list(examples), 3: []}, reconstruction=reconstruction)
    of = sites()
    if names:
        of = tuple(replace(s, model_name=n) for s, n in zip(of, names, strict=True))
    return render(made, of, **options)


def line_of(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line


def cells(text: str, start: str) -> list[str]:
    return [cell.strip() for cell in line_of(text, start).split("  ") if cell]


# --- a measurement --------------------------------------------------------------------------------


def test_the_title_names_models_and_hook():
    first = rendered().splitlines()[0]
    assert first == "What changed from tiny-base to tiny-finetuned at blocks.1.hook_resid_post"
    base, finetuned = sites()
    made = measurement(latent_measures([1.0], [1.0], [1]), examples={})
    text = render(made, (base, replace(finetuned, adapter="me/lora")))
    assert text.startswith("What changed from tiny-base to me/lora at")
    assert text.endswith("No latent is active on 10 held-out tokens or more: none is ranked.")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("/home/me/base", "/data/tuned/"), "base to tuned"),
        (("org/base", "./runs/tuned"), "org/base to tuned"),
        (("/one/model", "/two/model"), "/one/model to /two/model"),
    ],
)
def test_the_title_has_no_folders_where_names_tell_models_apart(names, shown):
    assert rendered(names=names).replace("\n", " ").startswith(f"What changed from {shown} at")


def test_the_tables_hold_the_measured_numbers():
    text = rendered()
    assert "5 latents on 12,345 held-out tokens" in text
    assert cells(text, "0.951") == ["0.951", "0.943", "0.679", "5.7%", "12.3", "25.0%"]
    # Active latents of each class, and the share of the difference that they explain alone.
    classes = {"base-only": 0.011, "shared": 0.222, "other": 0.333, "finetuned-only": 0.444}
    for name, fve in classes.items():
        assert cells(text, f"{name} ") == [name, "1", f"{fve:.3f}"]
    # 617 of 12,345 tokens; the columns are place, latent, R, cosine, class and active.
    assert cells(text, "1  ") == ["1", "4", "1.000", "+1.00", "finetuned-only", "100.00%"]
    assert cells(text, "2  ") == ["2", "3", "0.750", "+1.00", "other", "5.00%"]
    assert "without values: explained difference, nu error, nu reconstruction" in text


def test_as_many_examples_are_shown_as_asked_for():
    example = {"before": "on the ", "after": " shore", "value": 1.0, "source": "text"}
    shown = [Example(token=t, **example) for t in ("one", "two", "three")]
    for n in (0, 1, 3):
        text = rendered(shown, n_examples=n)
        assert [f"[{t}]" in text for t in ("one", "two", "three")] == [n > i for i in range(3)]
        below = text.splitlines()[text.splitlines().index(line_of(text, "1  ")) + 1 :]
        assert [line.startswith("      on the [") for line in below[: n + 1]] == [
            *[True] * n,
            False,
        ]


def test_equal_models_and_unequal_widths_are_said():
    missing = {"difference_fve": None, "difference_fve_by_class": None}
    text = rendered(reconstruction=replace(RECONSTRUCTION, difference_share=0.0, **missing))
    assert "The models are equal at this hook" in text
    assert cells(text, "shared") == ["shared", "1"]
    text = rendered(reconstruction=replace(RECONSTRUCTION, difference_share=None, **missing))
    assert "The sites differ in width" in text


# --- interventions --------------------------------------------------------------------------------


def patching_text(result: PatchingResult) -> str:
    return as_text(patching_sections(result))


def causal_text(result: CausalTest) -> str:
    return as_text(causal_sections(result, is_brief=True))


def test_a_patching_row_has_kl_and_recovery_of_each_kind():
    nine = {"tokens": "first 9", "n_tokens": 56}
    text = patching_text(
        patching_result(
            patching_row("base stream", 0.0),
            patching_row("base stream", 0.0, **nine),
            patching_row("all latents", 0.8, n_latents=48),
            patching_row("all latents", -0.25, n_latents=48, **nine),
        )
    )
    assert "Candidates: the 5 finetuned-only latents" in text
    response, first = (f"KL recovery{part}" for part in text.split("KL recovery on")[1:])
    assert response.startswith("KL recovery response tokens (1,234 tokens of 7 prompts)")
    # KL 0.5 (1 - 0.8) and 0.5 (1 + 0.25).
    ends = "[0.000, 1.000]"
    assert cells(response, "all latents") == [
        "all latents",
        "48",
        f"0.100 {ends}",
        "80% [70%, 90%]",
    ]
    assert cells(first, "all latents")[2:] == [f"0.625 {ends}", "-25% [-35%, -15%]"]
    assert cells(first, "base stream") == ["base stream", "-", f"0.500 {ends}", "0% [-10%, 10%]"]


def test_random_draws_are_one_row_a_kind_with_their_mean_and_ends():
    random = [
        patching_row(f"{name} {i}", recovery, group="random", n_latents=5)
        for name, each in {
            "random latents": (0.1, 0.3, 0.5),
            "candidates, random directions": (0.0, -0.2),
        }.items()
        for i, recovery in enumerate(each)
    ]
    text = patching_text(patching_result(patching_row("base stream", 0.0), *random))
    # KL 0.45, 0.35, 0.25: mean 0.35, recovery 0.3; KL 0.5, 0.6: mean 0.55, recovery -0.1.
    assert cells(text, "random latents") == [
        "random latents, 3 draws", "5", "0.350 [0.250, 0.450]", "30% [10%, 50%]",
    ]  # fmt: skip
    assert cells(text, "candidates, random")[1:] == [
        "5", "0.550 [0.500, 0.600]", "-10% [-20%, 0%]",
    ]  # fmt: skip


def test_a_causal_row_has_its_numbers_and_its_test_is_explained():
    rows = causal_row(), causal_row(test="steer", strength=0.5), causal_row(test="insert")
    necessity, insert, steer = causal_text(causal_result(*rows)).split("\n\n")
    said = "Necessity: taboo (probability: base 0.0627, fine-tuned 0.965; 12 prompts)"
    assert necessity.splitlines()[0] == said
    joined = " ".join(necessity.split())
    assert "removed when the latents are ablated from the fine-tuned model." in joined
    assert "Controls: 100 of each kind, 20 sets of latents that are active as often." in joined
    assert "the whole activation at this hook changes 92% [80%, 95%] of the effect" in joined
    expected = ["shuffled", "1%", "3%", "0.03", "0.0123", "+0.0045"]
    assert cells(necessity, "top 3") == ["top 3", "79% [70%, 85%]", "86%", *expected]
    assert steer.startswith("Sufficiency by steering")
    assert cells(steer, "top 3") == ["top 3", "0.5", "79% [70%, 85%]", *expected]
    assert insert.startswith("Sufficiency by insertion")


def test_what_has_no_value_is_a_dash():
    silent = causal_row(
        "silent", share=NAN, share_low=NAN, share_high=NAN, of_reachable=NAN, control_mean=NAN,
        p_control_holm=NAN, off_target_ce=NAN,
    )  # fmt: skip
    text = causal_text(causal_result(silent, causal_row("near", share_high=math.inf)))
    dashes = ["silent", "-", "-", "shuffled", "-", "3%", "-", "0.0123", "-"]
    assert cells(text, "silent") == dashes
    assert "79% [70%, inf%]" in text
    equal = patching_row("base stream", NAN, kl=0.0)
    random = patching_row("random latents 0", NAN, kl=0.0, group="random", n_latents=5)
    text = patching_text(patching_result(equal, random, patching_row("other", 0.5)))
    assert cells(text, "base stream")[-1] == "-"
    assert cells(text, "random latents")[-1] == "-"


def test_curves_have_a_column_for_each_number_and_say_what_it_takes():
    plain = {"strongest": "", "control_high": NAN}
    shares = {1: 0.25, 10: 0.7, 30: 1.02}
    rows = [
        causal_row("score", n_latents=n, share=share, control_high=n / 100, off_target_kl=n / 1000,
                   of_reachable=share / 0.8, flag="broken model" * (n == 30))
        for n, share in shares.items()
    ]  # fmt: skip
    rows += [causal_row("PCA", n_latents=n, share=0.1, of_reachable=0.1, **plain) for n in (1, 10)]
    rows += [causal_row("all latents", n_latents=1024, share=0.75, **plain)]
    text = causal_text(causal_result(*rows))
    assert text.startswith("Necessity, by number: taboo (probability: base 0.0627, fine-tuned")
    # 0.7 / 0.8 is the first above 0.8, of the 30 tested last.
    assert cells(text, "score") == ["score", "25%", "70%", "102%", "10", "0.0100"]
    assert cells(text, "PCA") == ["PCA", "10%", "10%", "-", "-", "-"]
    assert cells(text, "controls of score") == ["controls of score", "1%", "10%", "30%", "-", "-"]
    assert "controls of PCA" not in text
    assert re.search(r"^ +set +1 +10 +30 +80% +KL$", text, re.MULTILINE)
    joined = " ".join(text.split())
    assert "All 1,024 latents together: 75% [70%, 85%]." in joined
    assert "Broken model (score at 30): the edit raises the cross-entropy" in joined


LONG = "base reconstruction, fine-tuned error and more of that kind than there is space for"


def test_no_line_is_wider_than_the_terminal():
    folder, word = "a/folder/of/models/" + "with-a-long-name-" * 6, "unbelievable" * 30
    of = {"value": 1.0, "source": word}
    examples = [Example(before=word, token=word, after=word, **of),
                Example(before="月" * 90, token="🌒" * 90, after="月" * 90, **of)]  # fmt: skip
    measured = rendered(examples, names=(folder + "base", folder + "finetuned"))
    joined = "".join(measured.split("\n\n")[0].split())
    assert folder + "base" in joined
    assert folder + "finetuned" in joined
    rows = [
        patching_row(variant, recovery, tokens=kind, n_tokens=n, n_latents=16_384, **changes)
        for kind, n in {"response": 1_234_567, "first 9": 987_654}.items()
        for variant, recovery, changes in (
            ("base stream", 0.0, {}),
            ("base reconstruction, fine-tuned error", 0.999, {"recovery_low": -40.0}),
            (LONG, -9.9, {"kl": 123.4567}),
            ("candidates, random directions 0", -9.9, {"group": "random"}),
        )
    ]
    patched = patching_text(patching_result(*rows))
    worst = {
        "value": -1.234e-5, "share": -9.98, "share_low": -99.0, "share_high": 9.98,
        "control_mean": -99.0, "control_high": 99.0, "strongest": "covariance", "flag":
        "broken model; above 100 %; broken control; control above 100 %",
        "off_target_kl": 10.1234, "off_target_ce": 10.1234, "of_reachable": -99.0,
    }  # fmt: skip
    causal = causal_text(causal_result(causal_row(LONG, **worst)))
    assert "…" in causal
    assert "-998% [-9900%, 998%]" in causal
    assert "broken model; above 100 %; broken control" in causal
    samples = samples_text([("Hello? " * 40, {"base": "word " * 90, "a latent x 2": "x"})])
    assert WIDTH == 100
    for shown in (measured, patched, causal, samples):
        assert max(map(n_columns, shown.splitlines())) <= WIDTH


def test_samples_are_one_paragraph_a_model():
    text = samples_text([("Hi\nthere", {"base": "a\n b", "latent 7 x 0.5": "\x1b[0m"})])
    assert text.splitlines() == [
        "> Hi there", "  base            a b", "  latent 7 x 0.5  \\x1b[0m",
    ]  # fmt: skip


@pytest.mark.parametrize("is_brief", [True, False])
def test_a_test_without_matched_latents_says_nothing_of_them(is_brief):
    result = replace(causal_result(causal_row(matched_mean=NAN)), n_matched=0)
    text = as_text(causal_sections(result, is_brief=is_brief))
    assert "active as often." not in text
    assert ("without values: " in text and "matched mean" in text) != is_brief
