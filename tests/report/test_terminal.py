import unicodedata
from dataclasses import replace

import pytest
from analysis.hand_made import RECONSTRUCTION, latent_measures, measurement, sites
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tl_crosscoder.analysis.examples.database import Example
from tl_crosscoder.report.terminal import INDENT, context, render
from tl_crosscoder.results.render import WIDTH


def columns(line: str) -> int:
    """Of a terminal, where CJK characters and emoji are two wide and combining marks none."""
    wide = {"W": 2, "F": 2}
    return sum(
        0
        if unicodedata.category(c) in ("Mn", "Me", "Cf")
        else wide.get(unicodedata.east_asian_width(c), 1)
        for c in line
    )


def in_context(before="on the ", token="sea", after=" shore", source="text", value=1.0):
    return Example(before=before, token=token, after=after, value=value, source=source)


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


def test_the_title_names_models_and_hook():
    first = rendered().splitlines()[0]
    assert first == "What changed from tiny-base to tiny-finetuned at blocks.1.hook_resid_post"


def test_an_adapter_is_named_instead_of_its_base():
    base, finetuned = sites()
    made = measurement(latent_measures([1.0], [1.0], [1]), examples={})
    text = render(made, (base, replace(finetuned, adapter="me/lora")))
    assert text.startswith("What changed from tiny-base to me/lora at")


def test_the_tables_hold_the_measured_numbers():
    text = rendered()
    assert "0.951" in line_of(text, "FVE base")
    assert "0.943" in line_of(text, "FVE finetuned")
    assert "0.679 " in line_of(text, "FVE of the difference ")
    assert "5.7% of the fine-tuned variance" in line_of(text, "FVE of the difference ")
    assert "12.3 active latents" in line_of(text, "L0")
    assert "25.0% of 5 latents silent on 12,345" in line_of(text, "dead")


@pytest.mark.parametrize(
    ("name", "n_living", "fve"),
    [("base-only", "1", "0.011"), ("shared", "1", "0.222"), ("finetuned-only", "1", "0.444")],
)
def test_every_class_has_its_living_latents_and_its_part_of_the_difference(name, n_living, fve):
    assert line_of(rendered(), name).split() == [name, n_living, fve]


def test_a_ranked_latent_has_its_measures():
    text = rendered()
    first, second = line_of(text, "1  latent"), line_of(text, "2  latent")
    for part in ("latent 4 ", "R 1.000", "says     -", "nu     -     -", "cosine +1.00", "100.00%"):
        assert part in first
    # 617 of 12,345 tokens
    for part in ("latent 3 ", "R 0.750", "fires 5.00%"):
        assert part in second


def test_as_many_examples_are_shown_as_asked_for():
    shown = [in_context(token=t) for t in ("one", "two", "three")]
    for n in (0, 1, 3):
        text = rendered(shown, n_examples=n)
        assert [f"[{t}]" in text for t in ("one", "two", "three")] == [n > i for i in range(3)]


def test_equal_models_are_said_to_be_equal():
    equal = replace(
        RECONSTRUCTION, difference_fve=None, difference_fve_by_class=None, difference_share=0.0
    )
    text = rendered(reconstruction=equal)
    assert "none: the models are equal at this hook" in line_of(text, "FVE of the difference ")
    assert line_of(text, "shared").split() == ["shared", "1", "-"]


def test_without_ranked_latents_the_tables_remain():
    made = measurement(latent_measures([1.0], [1.0], [1]), examples={})
    text = render(made, sites())
    assert "FVE base" in text
    assert text.endswith("No latent is active on 10 held-out tokens or more: none is ranked.")


def test_the_token_is_in_brackets_within_its_context():
    assert context(in_context()) == "on the [sea] shore  (text)"
    assert context(in_context(before="on the", token=" sea")) == "on the [sea] shore  (text)"
    assert context(in_context(before="on the sea", token="s")).startswith("on the sea[s] ")
    assert context(in_context(before="", token="The", after="")).startswith("[The]")


def test_control_characters_are_shown_and_do_not_move_the_cursor():
    assert "[\\n\\n]" in context(in_context(token="\n\n"))
    assert "[\\t]" in context(in_context(token="\t"))
    coloured = context(in_context(before="a\x1b[31mb\nc", token="\x1b[0m", after="\r\nd\x07e"))
    assert coloured == "a\\x1b[31mb c[\\x1b[0m] d\\x07e  (text)"
    # Neither can be printed as it is: one turns the line around, the other has no encoding.
    assert (
        context(in_context(token="\u202e", after=" \ud800")) == "on the [\\u202e] \\ud800  (text)"
    )


def test_a_long_context_is_cut_at_its_far_ends():
    words = " ".join(f"w{i}" for i in range(100))
    line = context(in_context(before=words + " ", after=" " + words))
    before, after = line.split(" [sea] ")
    assert before.startswith("…")
    assert before.endswith("w98 w99")
    assert after.startswith("w0 w1 w2")
    assert after.endswith("…  (text)")


def test_a_following_text_without_spaces_is_cut_and_not_dropped():
    line = context(in_context(before="x" * 100, after="y" * 100))
    assert "x[sea]yyyyyyyyyy" in line
    assert "[sea] yyyyyyyyyy" in context(in_context(before="x" * 100, after=" " + "y" * 100))


def test_combining_marks_take_no_room():
    accented = "e\u0301" * 40  # 80 characters, 40 columns
    assert context(in_context(before=accented + " ")).startswith(accented + " [sea]")


LONG = "unbelievable" * 30


@settings(deadline=None, max_examples=300)
@given(before=st.text(max_size=200), token=st.text(max_size=120), after=st.text(), source=st.text())
@example(before=LONG, token="a", after=LONG, source="s")
@example(before="w " * 80, token=LONG, after="w " * 80, source="s")
@example(before="w " * 80, token="a", after="w " * 80, source=LONG)
@example(before="月" * 90, token="月" * 50, after="月" * 90, source="月" * 50)
@example(before="🌒 " * 50, token="🌒", after="🌒" * 50, source="emoji")
@example(before="line\n" * 50, token="\n\n\n", after="\u2028line\r\n" * 50, source="two\nlines")
def test_a_context_is_one_line_no_wider_than_the_terminal(before, token, after, source):
    line = context(in_context(before, token, after, source))
    assert not {"\n", "\r", "\x1b", "\t"} & set(line)
    assert columns(INDENT + line) <= WIDTH


def test_no_line_of_all_is_wider_than_the_terminal():
    folder = "/a/folder/of/models/" + "with-a-long-name-" * 6
    examples = [in_context(LONG, LONG, LONG, LONG), in_context("月" * 90, "🌒" * 90, "月" * 90)]
    text = rendered(examples, names=(folder + "base", folder + "finetuned"))
    assert WIDTH == 100
    assert max(columns(line) for line in text.splitlines()) <= WIDTH
    joined = "".join(text.split("\n\n")[0].split())
    assert folder + "base" in joined
    assert folder + "finetuned" in joined
