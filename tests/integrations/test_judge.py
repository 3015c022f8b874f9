"""A judge on a local endpoint that answers by a rule, so that scores are known by hand."""

import json
import math
import shutil
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from report.result_rows import change_row, changes_result
from text_of_ids import text_of
from transformers import AutoTokenizer

from tl_crosscoder.analysis.example_database import StoredExample
from tl_crosscoder.analysis.firing import ActiveTokens
from tl_crosscoder.cli.main import main
from tl_crosscoder.integrations import judge_client
from tl_crosscoder.integrations.config import JudgeConfig
from tl_crosscoder.integrations.judge_client import AnswerCache, Judge
from tl_crosscoder.integrations.judging import Judged, JudgedChanges, judge_run
from tl_crosscoder.integrations.naming import (
    Window,
    WindowSampler,
    batches,
    detection,
    detection_prompt,
    marked,
    marks_for,
    naming_prompt,
    read_name,
    read_verdicts,
    strength,
)
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.report.html import ReportSettings
from tl_crosscoder.report.html.data import collect
from tl_crosscoder.report.html.page import page
from tl_crosscoder.run.run import Run

SIZE = 12


def window(text: str, *, is_active: bool) -> Window:
    return Window(text=text, is_active=is_active, context=1, position=0)


def ask(text: str) -> list[dict[str, str]]:
    return detection_prompt("the word 'moon'", [window(text, is_active=True)])


@pytest.fixture
def judge(server, tmp_path):
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        yield Judge(JudgeConfig(model="rule", base_url=server.url, n_parallel=2), cache)


def test_balanced_accuracy_of_a_judge_who_looks_for_a_word(judge):
    active = ["the moon", "a moon", "moon!", "the sun"]  # 3 of 4 are called active
    inactive = ["a cat", "moonlight", "a dog", "rain", "wind"]  # 4 of 5 are not
    windows = [window(t, is_active=t in active) for t in [*active, *inactive]]
    prompts = [detection_prompt("the word 'moon'", b) for b in batches(windows, 4)]
    score = detection(windows, judge.ask(prompts), n_per_request=4)
    assert score.balanced_accuracy.value == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert score.n_read == 9
    assert score.balanced_accuracy.low < 0.775 < score.balanced_accuracy.high <= 1


def test_windows_of_an_answer_that_cannot_be_read_are_left_out_and_counted(judge):
    texts = {"the moon": True, "the sun": False, "garble": True, "a moon": False}
    windows = [window(t, is_active=a) for t, a in texts.items()]
    prompts = [detection_prompt("the word 'moon'", b) for b in batches(windows, 2)]
    score = detection(windows, judge.ask(prompts), n_per_request=2)
    # Of the second request nothing is known, and the first is right about both.
    assert (score.n_read, score.balanced_accuracy.value) == (2, 1.0)
    none = detection(windows, ["", "[1]"], n_per_request=2)
    assert none.n_read == 0
    assert math.isnan(none.balanced_accuracy.value)


@pytest.mark.parametrize(
    ("answer", "verdicts"),
    [
        ("[1, 0]", [True, False]),
        ("First [0, 0, 1], no: [true,false]", [True, False]),
        ("[1, 2]", None),
        ("[1]", None),
        ("[1, [0]]", None),
        ("1, 0", None),
        ("[1, 0", None),
    ],
)
def test_verdicts_are_the_last_list_of_an_answer(answer, verdicts):
    assert read_verdicts(answer, 2) == verdicts


def test_what_was_answered_is_not_sent_again(judge, server, tmp_path):
    prompts = [ask("the moon"), ask("the sun"), ask("the moon")]
    first = judge.ask(prompts)
    assert first == [f"Those with the word are active: [{i}]" for i in (1, 0, 1)]
    assert len(server.requests) == 2
    assert {(r["temperature"], r["seed"], r["model"]) for r in server.requests} == {(0, 0, "rule")}
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        again = Judge(judge.config, cache)
        assert again.ask(prompts) == first
        assert len(server.requests) == 2
        # Another model, seed or place is another request.
        for other in ({"model": "other"}, {"seed": 1}, {"base_url": "http://localhost/v1"}):
            fields: dict[str, Any] = {"model": "rule", "base_url": server.url, **other}
            assert Judge(JudgeConfig(**fields), cache).known(prompts[0]) is None
    assert b"a-key" not in (tmp_path / "answers.sqlite").read_bytes()
    assert server.keys == {"Bearer a-key"}


def test_a_busy_endpoint_is_asked_again(judge, server):
    server.n_busy = 1
    assert judge.ask([ask("the moon")]) == ["Those with the word are active: [1]"]
    assert len(server.requests) == 2


def test_what_was_answered_before_a_refusal_is_kept(judge, server):
    server.refused = "sun"
    with pytest.raises(OSError, match=r"'rule' could not be asked: .*refused.*is kept"):
        judge.ask([ask("the moon"), ask("the sun")])
    n_sent = len(server.requests)
    server.refused = ""
    judge.ask([ask("the moon"), ask("the sun")])
    assert len(server.requests) == n_sent + 1


def reply_of(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize(
    "reply",
    [b"[]", b"3", b"{}", b"null", b"hello", b"{", b'{"choices": null}', b'{"choices": []}',
     b'{"choices": 3}', b'{"choices": "abc"}', b'{"choices": [3]}', b'{"choices": [null]}',
     b'{"choices": [{"message": null}]}', b'{"choices": [{"message": [1]}]}',
     reply_of(3), reply_of([{"type": "text", "text": "a"}]), b"[" * 100_000],
)  # fmt: skip
def test_a_reply_that_is_no_answer_is_an_error_of_one_sentence(judge, server, reply):
    server.reply = reply
    with pytest.raises(OSError, match=r"'rule' could not be asked: .*without choices that hold"):
        judge.ask([ask("the moon")])


@pytest.mark.parametrize("content", [None, "", "  "])
def test_an_empty_answer_is_not_kept(judge, server, content):
    server.reply = reply_of(content)
    assert judge.ask([ask("the moon")]) == [""]
    server.reply = None
    assert judge.ask([ask("the moon")]) == ["Those with the word are active: [1]"]


def test_a_reply_without_end_is_not_read_to_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(judge_client, "MAX_BYTES", 10**6)
    server.reply, server.is_endless = b"x" * 10**5, True
    config = JudgeConfig(model="rule", base_url=server.url, n_retries=0)
    with (
        AnswerCache(tmp_path / "a.sqlite") as cache,
        pytest.raises(OSError, match="is longer than 1,000,000 b"),
    ):
        Judge(config, cache).ask([ask("the moon")])


def test_a_key_that_is_echoed_is_not_shown(judge, server, tmp_path):
    server.reply = b'"KEY"'
    with pytest.raises(OSError, match=r"Bearer \(the key\)") as caught:
        judge.ask([ask("the moon")])
    assert "a-key" not in "".join(traceback.format_exception(caught.value))
    server.reply = reply_of("you are KEY \ud800")
    assert judge.ask([ask("the moon")]) == ["you are Bearer (the key) ?"]
    assert b"a-key" not in (tmp_path / "answers.sqlite").read_bytes()


def test_a_missing_key_and_a_missing_library_say_what_to_do(judge, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        judge.ask([ask("the moon")])
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError, match=r"tl-crosscoder\[judge\]"):
        judge.ask([ask("the moon")])
    assert server.requests == []


def test_marks_are_not_in_the_text():
    code = replace(example(1, (0, 1, 0)), tokens=("if x <", "< 2 and a[", "[0]]"))
    assert marks_for([code]) == ("⟦", "⟧")
    system, asked = naming_prompt([example(1, (1,)), code], max_code=1)
    assert "stand between ⟦ and ⟧;" in system["content"]
    assert "if x <⟦< 2 and a[⟧[0]]" in asked["content"]
    every = replace(code, tokens=("<<", "[[⟦«⟨⟨{{", ">>"))
    assert marks_for([every]) == ("<<<<", ">>>>")


def example(value: float, activations: tuple[float, ...], *, context: int = 0) -> StoredExample:
    tokens = tuple("abcde"[: len(activations)])
    return StoredExample(
        latent=0, kind="top", quantile=None, rank=0, value=value, before="", token="", after="",
        tokens=tokens, activations=activations, at=0, role="text", source="s", context=context,
        position=0,
    )  # fmt: skip


def test_tokens_above_three_tenths_of_the_largest_code_are_marked():
    # The limit is 0.3 x 2 = 0.6: neighbours share a pair, and the last one is closed.
    assert marked(example(2, (0, 2, 0.7, 0.6, 1))) == "a<<bc>>d<<e>>"
    assert marked(example(2, (0, 2, 0.7, 0.6, 1)), ("[[", "]]")) == "a[[bc]]d[[e]]"
    assert [strength(code, 2.0) for code in (2, 1.9, 1.0, 0.01)] == [10, 10, 5, 1]
    prompt = naming_prompt([example(1, (1, 0))], max_code=2, promoted=['"'])
    assert prompt[-1]["content"] == (
        'Excerpt 1 (strength 5): "<<a>>b"\nTokens that it makes most likely to come next: ["\\""]'
    )


def test_names_are_read_whatever_is_around_them():
    for answer in (
        "NAME: Moon\nEXPLANATION: Of the moon.",
        "NAME: Sun\nNo.\n\n**NAME:** Moon\n- **EXPLANATION**: Of the moon.\x1b",
    ):
        name = read_name(answer)
        assert name is not None
        assert (name.name, name.explanation) == ("Moon", "Of the moon.")
    assert read_name("NAME: Moon") is None
    assert read_name("") is None


@pytest.fixture(scope="module")
def sampled():
    """A text of words in a random order, and two latents with codes at some of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("tl_crosscoder/world-base"))
    generator = torch.Generator().manual_seed(0)
    text = text_of(torch.randint(300, 1400, (60, SIZE), generator=generator))
    codes = torch.rand(60, SIZE, 2, generator=generator)
    codes[torch.rand(codes.shape, generator=generator) < 0.9] = 0
    codes[:, 0] = 0
    latents, positions = codes.flatten(0, 1).T.nonzero().T
    active = ActiveTokens(
        latents=latents,
        positions=positions,
        values=codes.flatten(0, 1).T[latents, positions],
        mask=(torch.arange(SIZE) > 0).expand(60, SIZE),
        d_sae=2,
    )
    return active, text, tokenizer, codes


def test_windows_are_what_they_say_and_no_name_is_made_from_them(sampled):
    active, text, tokenizer, codes = sampled
    sizes = {"n_active": 10, "n_inactive": 8, "n_hard": 3, "n_before": 2, "n_after": 1}
    sampler = WindowSampler(active, text, tokenizer, config=JudgeConfig(model="m", **sizes))
    windows = sampler.draw(0, others=[0, 1])
    assert [sum(w.is_active == kind for w in windows) for kind in (True, False)] == [10, 8]
    assert windows == sampler.draw(0, others=[0, 1])
    n_hard = 0
    for w in windows:
        near = codes[w.context, max(0, w.position - 2) : w.position + 2]
        assert w.is_active == bool((near[:, 0] > 0).any())
        assert w.context % 2 == 1
        assert w.position > 0  # the first token of a context does not count
        n_hard += not w.is_active and bool(codes[w.context, w.position, 1] > 0)
    assert n_hard >= 3
    assert len({w.context for w in windows if w.is_active}) == 10
    seen = {w.text for w in windows}
    assert not seen & {w.text for w in sampler.draw(0, others=[0, 1], seen=seen)}


def test_windows_with_the_latent_are_spread_over_its_quantiles(sampled):
    active, text, tokenizer, codes = sampled
    sizes = {"n_active": 6, "n_inactive": 1, "n_quantiles": 3, "n_before": 0, "n_after": 0}
    config = JudgeConfig(model="m", **sizes)
    windows = WindowSampler(active, text, tokenizer, config=config).draw(0)
    values = sorted(codes[w.context, w.position, 0].item() for w in windows if w.is_active)
    own = sorted(codes[1::2, :, 0][codes[1::2, :, 0] > 0].tolist())
    # Two of each third: bins are of one token a context, so a little off those of all tokens.
    n = len(own)
    assert values[1] < own[n // 2] < values[4]
    assert len(values) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": ""}, "the judge has no model"),
        ({"n_active": 0}, "n_active is 0; it must be above 0"),
        ({"n_retries": -1}, "n_retries is -1; it must be 0 or more"),
        ({"n_hard": 21}, r"n_hard is 21; it must be in \[0, n_inactive\], 20"),
        ({"n_top": 0, "n_quantile": 0}, "a name needs at least one example"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        JudgeConfig(**{"model": "m", **fields})


def test_the_judge_asks_only_when_told_to_and_never_twice(run, server, capsys):
    """Of three latents that are active on a few percent of the tokens, one named twice."""
    rate = run.measurement().latents.firing.rate
    latents = (rate - 0.08).abs().argsort()[:3].tolist()
    ask = [
        "judge", str(run.path), "--model", "rule", "--base-url", server.url, "--latents",
        *map(str, [*latents, latents[0]]), "--n-active", "6", "--n-inactive", "6",
        "--n-per-request", "4",
    ]  # fmt: skip
    assert main(ask) == 0
    printed = capsys.readouterr().out
    n_asked = int(printed.split()[0])
    assert f"requests to rule; 0 are answered already, {n_asked} would be sent" in printed
    assert "Nothing was sent" in printed
    assert server.requests == []
    assert not (run.path / "judge_cache.sqlite").exists()

    assert main([*ask, "--send"]) == 0
    n_sent = len(server.requests)
    judged = Judged.load(run.path / "judged.json")
    # 3 names, and the windows of each latent, 4 a request, by two explanations.
    n_windows = [row.n_active + row.n_inactive for row in judged.rows]
    assert n_asked == 3 + 2 * sum(-(-n // 4) for n in n_windows)
    # Two explanations that are the same word make one request of two.
    words = {row.explanation for row in judged.rows}
    assert n_sent == n_asked if len(words) == 3 else n_sent < n_asked
    printed = capsys.readouterr().out
    for row in judged.rows:
        assert min(row.n_active, row.n_inactive) >= 3
        assert row.n_read == row.n_read_control == row.n_active + row.n_inactive
        assert row.explanation == f"the word '{row.name}'"
        assert row.control_of in {r.latent for r in judged.rows} - {row.latent}
        assert f"latent {row.latent} {row.name}: the word" in printed

    flags = {"model": "rule", "base_url": server.url, "n_per_request": 4}
    sizes = {"latents": tuple(latents), "n_active": 6, "n_inactive": 6}
    again = judge_run(run, JudgeConfig(**flags, **sizes))
    assert len(server.requests) == n_sent
    # As it was saved and loaded, NaN included.
    assert repr(again) == repr(judged) == repr(Judged.load(run.path / "judged.json"))

    # No window is text that a name was made from.
    shown = [r["messages"][-1]["content"] for r in server.requests]
    names = "\n".join(s for s in shown if not s.startswith("Explanation"))
    windows = [line.split(": ", 1)[1] for s in shown if s.startswith("Explanation")
               for line in s.splitlines()[1:]]  # fmt: skip
    assert windows
    assert not [w for w in windows if w in names.replace("<<", "").replace(">>", "")]


def test_changes_are_named_from_their_texts(run, server, tmp_path, capsys):
    folder = Path(shutil.copytree(run.path, tmp_path / "copy"))
    changed = changes_result(
        change_row(), change_row(place=2, latents=(7,), finetuned_text="No </p>, it is \nnot.")
    )
    changed.save(folder / "changes.json")
    ask = ["judge", str(folder), "--model", "rule", "--base-url", server.url, "--n", "1"]
    ask += ["--n-active", "2", "--n-inactive", "2", "--no-control"]
    assert main(ask) == 0
    printed = capsys.readouterr().out
    assert "A request for a name of a change:" in printed
    assert json.dumps(changed.rows[0].before, ensure_ascii=False) in printed
    assert server.requests == []

    assert main([*ask, "--send"]) == 0
    printed = capsys.readouterr().out
    first, second = JudgedChanges.load(folder / "judged_changes.json").rows
    assert (first.name, first.explanation) == ("writes", f"it writes {first_text(changed)}")
    assert second.latents == (7,)
    assert f"change 1 writes: it writes {first_text(changed)}" in " ".join(printed.split())
    asked = [r["messages"][-1]["content"] for r in server.requests]
    assert sum(each.startswith("Text 1:") for each in asked) == 2

    html = page(collect(Run(path=folder), ReportSettings(n_latents=2, models=False)), {})
    assert f"writes. it writes {first_text(changed)}" in html
    assert "No &lt;/p&gt;, it is" in html
    # A change of other latents is another change.
    changes_result(change_row(latents=(3,))).save(folder / "changes.json")
    data = collect(Run(path=folder), ReportSettings(n_latents=2, models=False))
    assert data.change_names == [""]
    assert main([*ask, "--no-changes"]) == 0
    assert "name of a change" not in capsys.readouterr().out


def first_text(changed) -> str:
    return changed.rows[0].finetuned_text
