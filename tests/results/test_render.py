"""What results look like: digits, layout, and that no text becomes markup or moves the cursor."""

import math
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from analysis.hand_made import crosscoder, latent_measures, measurement
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tl_crosscoder import Crosscoder
from tl_crosscoder.analysis.examples import Example
from tl_crosscoder.analysis.latents import rank_latents
from tl_crosscoder.analysis.lens import LogitEffect, LogitEffects
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.interventions.patching import PatchingResult, PatchingRow
from tl_crosscoder.results.measures import MEASURES
from tl_crosscoder.results.render import (
    N_ROWS,
    WIDTH,
    Section,
    as_html,
    as_text,
    in_context,
    table_html,
    visible,
)
from tl_crosscoder.results.tables import N_OF_TENSORS

HOSTILE = "</td></script><img src=x onerror=alert(1)>\"'&amp;\x00\u202e"


class Page(HTMLParser):
    """Tags in order, and the text of each cell with the class and title of its element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[tuple[str, dict[str, str], str]] = []
        self.feed(str(html))
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag in ("td", "th", "p"):
            self.cells.append((tag, {k: v or "" for k, v in attrs}, ""))

    def handle_data(self, data: str) -> None:
        if self.cells:
            tag, attributes, text = self.cells[-1]
            self.cells[-1] = tag, attributes, text + data

    def of(self, tag: str) -> list[str]:
        return [text for kind, _, text in self.cells if kind == tag]


def row(**values: Any) -> PatchingRow:
    fields = PatchingRow.__dataclass_fields__
    numbers = {name: 0 if name.startswith("n_") else 0.0 for name in fields}
    return PatchingRow(**{**numbers, "variant": "x", "group": "g", "tokens": "all", **values})


def patching_result(*rows: PatchingRow) -> PatchingResult:
    return PatchingResult(
        rows=rows, compared=("base", "finetuned"), candidates="two", candidate_latents=(3, 4)
    )


def test_every_measure_says_what_it_is():
    for name, measure in MEASURES.items():
        assert measure.label or name == ""
        assert not measure.meaning or measure.meaning.endswith((".", ")", ":")), name
        if measure.form not in (None, "token"):
            format(1, measure.form)


# --- HTML -----------------------------------------------------------------------------------------


def test_intervals_are_folded_and_labels_are_of_the_field():
    kl = {"kl": 0.25, "kl_low": 0.2, "kl_high": 0.3}
    recovery = {"recovery": math.nan, "recovery_low": 0.1, "recovery_high": 0.2}
    page = Page(patching_result(row(n_tokens=2935, **kl, **recovery))._repr_html_())
    assert dict(zip(page.of("th")[3:], page.of("td")[3:], strict=True)) == {
        "n tokens": "2,935", "n latents": "0", "prompts": "0", "KL": "0.250 [0.200, 0.300]",
        "CE": "0.000 [0.000, 0.000]",
    }  # fmt: skip
    (title,) = [a["title"] for _, a, text in page.cells if text == "KL"]
    assert title.startswith("nats a token: KL(fine-tuned ‖ patched)")
    assert title.endswith("95 % interval.")
    assert page.of("p")[0].startswith("PatchingResult: compared base, finetuned, candidates two")
    assert page.of("p")[1] == "without values: KL recovery"


def test_numbers_stand_right_and_nan_is_a_dash():
    page = Page(table_html({"name": ["a", "b"], "loss": [1.5, math.nan], "n": [1234, None]}))
    kinds = {text: attributes["class"] for _, attributes, text in page.cells}
    assert page.of("td") == ["a", "1.500", "1,234", "b", "\N{EN DASH}", "\N{EN DASH}"]
    assert kinds["1.500"] == kinds["1,234"] == kinds["loss"] == "tlx-n"
    assert kinds["a"] == kinds["name"] == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.5, 12.0], ["0.500", "12.000"]), ([1e-9, 2.0], ["1e-09", "2"]), ([0.0], ["0.000"])],
)
def test_small_numbers_keep_their_digits(values, expected):
    assert Page(table_html({"loss": values})).of("td") == expected


def test_the_first_rows_are_shown_and_the_rest_is_said():
    section = Section(columns={"n": [*range(N_ROWS + 1)]})
    page = Page(as_html([section]))
    assert len(page.of("td")) == N_ROWS
    assert page.of("p") == [f"{N_ROWS} of {N_ROWS + 1} rows; to_frame() has all"]
    assert Page(table_html({"n": []})).of("p") == ["no rows"]
    assert as_text([section]).endswith("to_frame() has all")
    assert as_text([section], is_whole=True).endswith(f"  {N_ROWS}")
    assert as_text([Section(columns={"n": []})]) == "no rows"


@settings(max_examples=40)
@given(st.text(), st.text(min_size=1))
@example("", " ")
@example(HOSTILE, HOSTILE)
def test_no_text_becomes_markup(value, name):
    token = Example(before=value, token=value, after=value, value=0.0, source=value)
    section = Section(title=value, columns={name: [value]}, examples=[[token]], notes=[value])
    page = Page(as_html([section]))
    title = ["p"] if value else []
    table = ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td", "b", "u"]
    assert page.tags == ["div", "style", *title, *table, "p"]
    assert page.of("td") == [visible(value)[:4000], visible(value) * 3]
    assert page.of("th")[0] == visible(name) or name in MEASURES
    assert not {"\x00", "\x1b", "\r", "\u202e"} & {*as_text([section])}


def test_tokens_of_a_result_are_escaped_and_their_spaces_kept():
    about = {"latent": 1, "direction": "base", "is_promoted": True, "rank": 1, "token_id": 7}
    effect = LogitEffect(token=f" {HOSTILE}\n", logit=0.5, **about)
    page = Page(LogitEffects(rows=(effect,), d_vocab=9)._repr_html_())
    ((attributes, text),) = [(a, t) for kind, a, t in page.cells if kind == "td" and "img" in t]
    assert attributes["class"] == "tlx-t"
    assert text == " </td></script><img src=x onerror=alert(1)>\"'&amp;\\x00\\u202e\\n"


def test_a_measurement_shows_its_numbers_and_examples():
    latents = latent_measures([1.0, 1.0, 0.0], [0.0, 1.0, 2.0], [20, 1500, 12345])
    token = Example(before="on ", token="<sea>", after=" shore", value=1.0, source="text")
    cells = Page(measurement(latents, examples={2: [token], 0: []})._repr_html_()).of("td")
    assert cells[0] == "0.951"  # FVE base, 0.9514
    # The last two rows: latent 2, R 1, and latent 0, R 0, which has no example.
    rows = [cells[-14:-7], cells[-7:]]
    assert [(r[1], r[2], r[-1]) for r in rows] == [
        ("2", "1.000", "on <sea> shore"), ("0", "0.000", "\N{EN DASH}"),
    ]  # fmt: skip


def test_latents_without_norms_have_no_class_and_none_ranked_is_said():
    latents = latent_measures([0.0], [0.0], [20])
    assert "class" in Page(rank_latents(latents, by="activity")._repr_html_()).of("p")[-1]
    page = Page(measurement(latents, examples={})._repr_html_())
    assert page.of("p")[-1].startswith("No latent is active on 10 held-out tokens or more")


def test_models_and_dictionary_name_their_sites(taboo_pair):
    page = Page(taboo_pair._repr_html_())
    assert page.of("td")[:3] == ["base", "tl_crosscoder/world-base", "\N{EN DASH}"]
    assert "raw weights" in page.of("p")[0]
    assert "minus the above" in taboo_pair.difference()._repr_html_()
    base, finetuned = crosscoder(torch.ones(5, 2), torch.ones(5, 2)).sites
    site = replace(finetuned, name="difference", minus=base, scale=3.0)
    page = Page(Crosscoder(CrosscoderConfig(d_in=2, d_sae=5, sites=(site,)))._repr_html_())
    assert page.of("p")[0].startswith("Crosscoder: 5 latents, d_in 2, float32 on cpu")
    assert page.of("td") == [
        "base", "tiny-base", "blocks.1.hook_resid_post", "2", "\N{EN DASH}",
        "difference, minus the above", "tiny-finetuned", "blocks.1.hook_resid_post", "2", "3.000",
    ]  # fmt: skip


# --- text -----------------------------------------------------------------------------------------


def columns(line: str) -> int:
    """Columns of a terminal: CJK characters and emoji have two and combining marks none."""
    wide = {"W": 2, "F": 2}
    marks = ("Mn", "Me", "Cf")
    return sum(
        0 if unicodedata.category(c) in marks else wide.get(unicodedata.east_asian_width(c), 1)
        for c in line
    )


def test_a_result_prints_as_lines_of_the_same_cells():
    kl = {"kl": 0.25, "kl_low": 0.2, "kl_high": 0.3, "recovery": math.nan}
    rows = row(variant="top", n_tokens=2935, **kl), row(variant="all latents", n_tokens=7)
    about, top, head, first, second, *rest = str(patching_result(*rows)).splitlines()
    assert about.startswith("PatchingResult: compared base, finetuned, candidates two")
    assert (top.split(), " ".join(head.split())) == (
        ["n", "n"], "variant group tokens latents tokens prompts KL CE",
    )  # fmt: skip
    assert first.split()[:7] == ["top", "g", "all", "0", "2,935", "0", "0.250"]
    assert first.index("[0.200, 0.300]") == second.index("[0.000, 0.000]")
    # The others are in the block below, and the name again; NaN is a dash.
    assert rest[-2].split() == ["top", "-"]


def test_columns_that_do_not_fit_go_below_and_wide_headings_are_wrapped():
    cells = ["x" * 60, "\N{CJK UNIFIED IDEOGRAPH-6708}\n", "\u202e"]
    wide = {"": [*range(3)], **{f"column {i}": cells for i in range(4)}}
    blocks = as_text([Section(columns=wide)]).split("\n\n")
    assert [block.splitlines()[1][:8].split() for block in blocks] == [["0", "xxx"]] * 4
    assert "x" * 60 not in blocks[0]
    assert "\N{CJK UNIFIED IDEOGRAPH-6708}\\n" in blocks[0]
    narrow = Section(columns={"latent": [3], "explained_difference": [0.057]})
    assert as_text([narrow]).splitlines() == [
        "           explained", "  latent  difference", "       3       5.70%",
    ]  # fmt: skip


def test_tensors_print_as_a_few_rows_with_whole_counts():
    norms = [1.0] * (N_OF_TENSORS + 2)
    firing = latent_measures(norms, norms, [1234] * len(norms)).firing
    text = str(firing)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.count("1,234 ") >= 2 * N_OF_TENSORS  # active at all, and on the one source
    assert f"{N_OF_TENSORS} of {len(norms)} rows" in text
    page = Page(firing._repr_html_())
    assert page.of("td")[:2] == ["0", "1,234"]
    assert "tensors" not in page.of("p")[0]


def token(before="on the ", token="sea", after=" shore", source="text") -> Example:
    return Example(before=before, token=token, after=after, value=1.0, source=source)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, "on the [sea] shore  (text)"),
        ({"before": "on the", "token": " sea"}, "on the [sea] shore  (text)"),
        ({"before": "on the sea", "token": "s"}, "on the sea[s] shore  (text)"),
        ({"before": "", "token": "The", "after": ""}, "[The]  (text)"),
        ({"token": "\n\n"}, "on the [\\n\\n] shore  (text)"),
        ({"before": "a\x1b[31mb\nc", "token": "\x1b[0m", "after": "\r\nd\x07e"},
         "a\\x1b[31mb c[\\x1b[0m] d\\x07e  (text)"),
        # Neither can be printed as it is: one turns the line around, the other has no encoding.
        ({"token": "\u202e", "after": " \ud800"}, "on the [\\u202e] \\ud800  (text)"),
        ({"before": "e\u0301" * 40}, "e\u0301" * 40 + "[sea] shore  (text)"),  # of 40 columns
    ],
)  # fmt: skip
def test_a_token_is_in_brackets_within_its_visible_context(parts, expected):
    assert in_context(token(**parts)).strip() == expected


def test_a_long_context_is_cut_at_its_far_ends():
    words = " ".join(f"w{i}" for i in range(100))
    before, after = in_context(token(words + " ", after=" " + words)).split(" [sea] ")
    assert before.strip().startswith("…")
    assert before.endswith("w98 w99")
    assert after.startswith("w0 w1 w2")
    assert after.endswith("…  (text)")
    assert "x[sea]yyyyyyyyyy" in in_context(token("x" * 100, after="y" * 100))


LONG = "unbelievable" * 30


@settings(deadline=None, max_examples=100)
@given(before=st.text(max_size=200), word=st.text(max_size=120), after=st.text(), source=st.text())
@example(before=LONG, word="a", after=LONG, source="s")
@example(before="w " * 80, word=LONG, after="w " * 80, source=LONG)
@example(before="月" * 90, word="月" * 50, after="月" * 90, source="月" * 50)
@example(before="🌒 " * 50, word="🌒", after="🌒" * 50, source="emoji")
@example(before="line\n" * 50, word="\n\n\n", after="\u2028line\r\n" * 50, source="two\nlines")
def test_a_context_is_one_line_no_wider_than_the_terminal(before, word, after, source):
    line = in_context(token(before, word, after, source))
    assert not {"\n", "\r", "\x1b", "\t"} & set(line)
    assert columns(line) <= WIDTH
