import math

from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.interventions.trials import CausalRow, CausalTest
from tl_crosscoder.report.tables import causal_table, patching_table, samples_table
from tl_crosscoder.report.terminal import WIDTH

NAN = math.nan


def patching_row(variant: str, recovery: float, *, tokens="response", **changes) -> PatchingRow:
    """KL 0.5 without recovery; the interval is a tenth to each side."""
    values = {
        "group": "dictionary", "n_latents": 0, "n_tokens": 1234, "n_prompts": 7,
        "kl": 0.5 * (1 - recovery), "kl_low": 0.0, "kl_high": 1.0,
        "ce": 2.0, "ce_low": 1.0, "ce_high": 3.0,
        "recovery_low": recovery - 0.1, "recovery_high": recovery + 0.1,
    }  # fmt: skip
    return PatchingRow(variant=variant, tokens=tokens, recovery=recovery, **(values | changes))


def patching_result(*rows: PatchingRow) -> PatchingResult:
    return PatchingResult(
        rows=rows,
        compared=("base", "sft"),
        candidates="the 5 finetuned-only latents",
        candidate_latents=(1, 2, 3, 4, 5),
    )


def causal_row(latents: str = "top 3", **changes) -> CausalRow:
    values = {
        "test": "necessity", "n_latents": 3, "strength": NAN, "value": 0.25, "base": 0.0627,
        "finetuned": 0.9654, "share": 0.7934, "share_low": 0.7, "share_high": 0.85,
        "random_mean": 0.012, "random_high": 0.034, "effect_size": 3.0, "p_random": 0.01,
        "p_random_holm": 0.0297, "matched_mean": -0.056, "p_matched": 0.2, "null_mean": NAN,
        "off_target_kl": 0.0123, "off_target_low": 0.0, "off_target_high": 1.0,
        "random_off_target_kl": 0.0456,
    }  # fmt: skip
    return CausalRow(latents=latents, **(values | changes))


def causal_result(*rows: CausalRow) -> CausalTest:
    return CausalTest(
        rows=rows, effect="taboo", unit="probability", n_prompts=12, n_random=100, n_matched=20,
        sets={},
    )  # fmt: skip


def line_of(text: str, start: str) -> str:
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return line


def test_a_patching_row_has_kl_and_recovery_of_each_kind():
    text = patching_table(
        patching_result(
            patching_row("base stream", 0.0),
            patching_row("base stream", 0.0, tokens="first 9", n_tokens=56),
            patching_row("all latents", 0.8, n_latents=48),
            patching_row("all latents", -0.25, tokens="first 9", n_latents=48, n_tokens=56),
        )
    )
    assert "KL(sft || patched)" in text
    assert "over 7 prompts" in text
    assert "Candidates: the 5 finetuned-only latents" in text
    # KL 0.5 (1 - 0.8) and 0.5 (1 + 0.25).
    assert line_of(text, "all latents").split("  ")[1:] == [
        "all latents", "48", "0.100 +80% [+70%, +90%]", "0.625 -25% [-35%, -15%]",
    ]  # fmt: skip
    assert line_of(text, "base stream").split()[:4] == ["base", "stream", "-", "0.500"]
    assert line_of(text, "n ").split("  ")[-2:] == [
        "response (1,234 tokens)", "first 9 (56 tokens)",
    ]  # fmt: skip


def test_random_draws_are_one_line_a_kind_with_their_mean_and_ends():
    random = [
        patching_row(f"{name} {i}", recovery, group="random", n_latents=5)
        for name, each in {
            "random latents": (0.1, 0.3, 0.5),
            "candidates, random directions": (0.0, -0.2),
        }.items()
        for i, recovery in enumerate(each)
    ]
    text = patching_table(patching_result(patching_row("base stream", 0.0), *random))
    # KL 0.45, 0.35, 0.25: mean 0.35, recovery 0.3; KL 0.5, 0.6: mean 0.55, recovery -0.1.
    assert line_of(text, "random latents").strip() == (
        "random latents, 3 draws     5  0.350 +30% (+10% to +50%)"
    )
    assert line_of(text, "random directions").strip() == (
        "random directions, 2 draws  5  0.550 -10% (-20% to +0%)"
    )


def test_a_causal_row_has_its_numbers():
    text = causal_table(causal_result(causal_row(), causal_row(test="steer", strength=0.5)))
    assert "Taboo, on 12 prompts; 100 norm-matched random directions and 20 sets" in text
    joined = " ".join(text.split())
    assert "(probability: base 0.0627, fine-tuned 0.965)" in joined
    necessity, steer = text.split("\n\n")[1:]
    assert necessity.startswith("Necessity: taken out of the fine-tuned model")
    assert steer.startswith("Sufficiency: the base model steered")
    expected = "0.25  +79% [+70%, +85%]     +1%   +3%   -6%  0.030  0.012   0.046"
    assert line_of(necessity, "top 3").split(None, 2)[2] == expected
    assert line_of(steer, "top 3, x 0.5").split(None, 4)[4] == expected


def test_what_has_no_value_is_a_dash_and_what_is_far_off_has_no_digits():
    row = causal_row(
        "silent", share=NAN, share_low=NAN, share_high=NAN, random_mean=NAN, random_high=-12.0,
        matched_mean=NAN, p_random_holm=NAN, random_off_target_kl=NAN,
    )  # fmt: skip
    text = causal_table(causal_result(row, causal_row("far", share=-50.0, share_high=math.inf),
                                      causal_row("near", share_low=-50.0)))  # fmt: skip
    cells = [c.strip() for c in line_of(text, "silent").split("  ") if c]
    assert cells == ["silent", "0.25", "-", "-", "<-999%", "-", "-", "0.012", "-"]
    assert "  <-999%  " in line_of(text, "far")
    assert "+79% [<-999%, +85%]" in line_of(text, "near")
    equal = patching_row("base stream", NAN, kl=0.0)
    random = patching_row("random latents 0", NAN, kl=0.0, group="random", n_latents=5)
    text = patching_table(patching_result(equal, random))
    assert line_of(text, "base stream").endswith("0.000 -")
    assert line_of(text, "random latents").endswith("0.000 - (- to -)")


LONG = "base reconstruction, fine-tuned error and more of that kind than there is room for"


def test_no_line_is_wider_than_the_terminal():
    kinds = {"response": 1_234_567, "first 9": 987_654, "template": 55_555}
    rows = [
        patching_row(variant, recovery, tokens=kind, n_tokens=n, n_latents=16_384, **changes)
        for kind, n in kinds.items()
        for variant, recovery, changes in (
            ("base stream", 0.0, {}),
            ("base reconstruction, fine-tuned error", 0.999, {"recovery_low": -40.0}),
            ("fine-tuned reconstruction", -123.0, {}),
            (LONG, -9.9, {"kl": 123.4567}),
            ("candidates, random directions 0", -9.9, {"group": "random"}),
        )
    ]
    text = patching_table(patching_result(*rows))
    # Side by side there is no room: a block for each kind, and names are cut where need be.
    assert text.count("base reconstruction, fine-tuned error  ") == 3
    assert sum(f"{kind} (" in line for line in text.splitlines() for kind in kinds) == 3
    worst = {
        "value": -1.234e-5, "share": -9.98, "share_low": -99.0, "share_high": 9.98,
        "random_mean": -99.0, "random_high": 99.0, "matched_mean": -99.0,
        "off_target_kl": 10.1234, "random_off_target_kl": 10.1234,
    }  # fmt: skip
    causal = causal_table(causal_result(causal_row(LONG, **worst)))
    assert "…" in causal
    assert "-1.23e-05  -998% [<-999%, +998%]" in causal
    samples = samples_table([("Hello? " * 40, {"base": "word " * 90, "a latent x 2": "x"})])
    for shown in (text, causal, samples):
        assert max(map(len, shown.splitlines())) <= WIDTH


def test_samples_are_one_paragraph_a_model():
    text = samples_table([("Hi\nthere", {"base": "a\n b", "latent 7 x 0.5": "\x1b[0m"})])
    blocks = text.split("\n\n")
    assert blocks[0].splitlines() == [
        "> Hi there", "  base            a b", "  latent 7 x 0.5  \\x1b[0m",
    ]  # fmt: skip
