"""A served report: what it answers, whom it refuses, and how it works in a browser."""

import json
import time
from dataclasses import asdict
from http.client import HTTPConnection

import pytest
import torch
from report.report_runs import PAIR, small_run

from tl_crosscoder.interventions.edits import Together
from tl_crosscoder.interventions.latent_edits import ablation, steering
from tl_crosscoder.interventions.live import is_local
from tl_crosscoder.interventions.running import kl_divergence
from tl_crosscoder.notebook.live_page import Ask, Live
from tl_crosscoder.notebook.model_diff import ModelDiff, load_diff
from tl_crosscoder.notebook.serve import Served
from tl_crosscoder.run.causal import prompt_ids

PROMPT = "Give me a hint."


@pytest.fixture(scope="module")
def diff(tmp_path_factory) -> ModelDiff:
    return load_diff(small_run(tmp_path_factory.getbasetemp(), *PAIR))


@pytest.fixture(scope="module")
def live(diff) -> Live:
    return Live(diff=diff)


def test_an_answer_has_texts_tokens_and_what_carries_their_difference(diff, live):
    found = live.answer(Ask(prompt=PROMPT, max_new_tokens=12))
    tried = diff.try_prompt(PROMPT, max_new_tokens=12)
    assert (found["base"], found["finetuned"]) == (tried.base, tried.finetuned)
    assert found["tokens"] == [*tried.tokens]
    assert found["n_prompt_tokens"] == tried.n_prompt_tokens
    assert found["edited"] is None
    n_new = len(found["tokens"]) - found["n_prompt_tokens"]
    assert len(found["kl"]) == n_new > 0
    assert min(found["kl"]) >= 0
    carried = [row["attribution"] for row in found["latents"]]
    assert carried == sorted(carried, reverse=True)
    assert all(len(row["codes"]) == len(found["tokens"]) for row in found["latents"])
    json.dumps(found, allow_nan=False)


def test_its_divergences_are_those_of_the_two_models(diff, live):
    found = live.answer(Ask(prompt=PROMPT, max_new_tokens=6))
    start = prompt_ids(diff.run, PROMPT)
    ((_, new),) = diff.models.generate_tokens([start], site="finetuned", max_new_tokens=6)
    logits = [
        diff.models.logits(torch.tensor([[*start, *new]]), site=name)[0].log_softmax(dim=-1)
        for name in ("finetuned", "base")
    ]
    expected = kl_divergence(*logits)[len(start) - 1 : -1]
    assert found["kl"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_edits_are_those_of_the_notebook_and_add_up(diff, live):
    latents = [row["latent"] for row in live.answer(Ask(prompt=PROMPT))["latents"]][:3]
    found = live.answer(Ask(prompt=PROMPT, without=tuple(latents)))
    assert found["edited"] == diff.ablate(latents).generate(PROMPT).texts["edited"][0]
    how = {"steered": latents[0], "strength": -1.0}
    for model in ("finetuned", "base"):
        steered = diff.steer(latents[0], strength=-1.0, site=model).generate(PROMPT)
        found = live.answer(Ask(prompt=PROMPT, model=model, **how))
        assert found["edited"] == steered.texts["edited"][0]
    ctx = diff.ctx
    alone = ablation(ctx, latents), steering(ctx, latents[0], strength=1.0, norm=2.0)
    both = Together(site=ctx.finetuned, edits=alone)
    text = diff.run.text(diff.run.documents()[:8])
    (acts, *_) = ctx.batches(text)
    x = acts.x[ctx.finetuned]
    expected = alone[0](acts) + alone[1](acts) - x
    torch.testing.assert_close(both(acts), expected, atol=1e-5, rtol=1e-5)
    assert not is_local(both)
    assert is_local(Together(site=ctx.finetuned, edits=alone[1:]))


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x", "max_new_tokens": 10_000}, "asks for 200 at most"),
        ({"prompt": "x", "model": "base", "without": (1,)}, "steer the base alone"),
        ({"prompt": "x", "without": (-1,)}, "must be 0 or more"),
        ({"prompt": "x", "strength": float("nan")}, "strength"),
    ],
)
def test_a_question_that_cannot_be_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        Ask(**ask)


# --- over HTTP ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(live):
    with Served(live, "<!doctype html><title>a report</title>") as served:
        yield served


def asked(served: Served, method: str, path: str, body=None, **headers) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    found = response.status, response.read().decode()
    connection.close()
    return found


def test_whoever_has_the_address_sees_the_page_and_asks(served, live):
    status, content = asked(served, "GET", f"/?token={served.token}")
    assert (status, content) == (200, "<!doctype html><title>a report</title>")
    ask = Ask(prompt=PROMPT, max_new_tokens=5)
    body = json.dumps(asdict(ask))
    status, content = asked(served, "POST", "/answer", body, **{"X-Token": served.token})
    assert status == 200
    assert json.loads(content) == json.loads(json.dumps(live.answer(ask)))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Token": "guessed"},
        {"Origin": "http://example.com"},
        {"Host": "example.com"},
        {"Origin": "null"},
    ],
    ids=["no token", "another", "foreign page", "foreign name", "no origin"],
)
def test_nobody_else_does(served, headers):
    own = {"X-Token": served.token} if headers and "X-Token" not in headers else {}
    for method, path in (("GET", "/"), ("POST", "/answer")):
        status, content = asked(served, method, path, b"{}", **own, **headers)
        assert status == 403
        assert served.token not in content


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("not JSON", "Expecting value"),
        ("[]", "must be a mapping"),
        ('{"prompt": "x", "temperature": 3}', "unknown fields"),
        ('{"prompt": "x", "without": [99999]}', "99999"),
        (json.dumps({"prompt": "moon " * 4000}), "token"),
    ],
    ids=["not JSON", "no mapping", "unknown", "latent", "long"],
)
def test_what_cannot_be_answered_is_said(served, body, message):
    status, content = asked(served, "POST", "/answer", body, **{"X-Token": served.token})
    assert status == 400
    assert message in json.loads(content)["error"]


def test_a_question_may_not_be_endless(served):
    body = json.dumps({"prompt": "x" * 2**17})
    try:
        status, _ = asked(served, "POST", "/answer", body, **{"X-Token": served.token})
    except (ConnectionError, OSError):
        return  # it hung up
    assert status >= 400


def test_a_port_that_is_taken_is_named(served, live):
    with pytest.raises(ValueError, match=rf"port {served.port} of 127\.0\.0\.1 cannot be"):
        Served(live, "", port=served.port)


def test_it_ends(live):
    one = Served(live, "")
    assert one.token in repr(one)
    assert one.token in one._repr_html_()
    one.close()
    one.close()
    with pytest.raises(ConnectionError):
        asked(one, "GET", "/")


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_reader_asks_and_edits(diff, browser):
    # First what is expected: while the page asks, the models are its.
    live = Live(diff=diff)
    found = live.answer(Ask(prompt=PROMPT))
    first = found["latents"][0]["latent"]
    without = live.answer(Ask(prompt=PROMPT, without=(first,)))["edited"]
    how = {"without": (first,), "steered": first, "strength": 2.0}
    steered = live.answer(Ask(prompt=PROMPT, **how))["edited"]

    def until(script: str, *values: object) -> None:
        deadline = time.monotonic() + 60
        while not browser.driver.execute_script(f"return {script}", *values):
            assert time.monotonic() < deadline, (script, values)
            time.sleep(0.05)

    with diff.serve(n_latents=6) as served:
        for name in ("browser", "performance"):
            browser.driver.get_log(name)
        browser.driver.get(served.url)
        until("document.getElementById('ask') !== null")
        browser.driver.execute_script(
            "document.querySelector('#ask textarea').value = arguments[0];"
            "document.getElementById('ask').requestSubmit();",
            PROMPT,
        )
        until("document.querySelectorAll('#behind tbody tr').length > 0")
        shown = browser.driver.execute_script("return document.getElementById('answer').innerText")
        assert found["base"] in shown
        assert str(first) in shown
        browser.driver.execute_script("document.querySelector('#behind input').click()")
        until("document.querySelector('#edited bdi')?.textContent === arguments[0]", without)
        browser.driver.execute_script(
            "document.querySelector('#behind input[type=radio]').click();"
            "const s = document.getElementById('strength'); s.value = 2;"
            "s.dispatchEvent(new Event('change'));"
        )
        until("document.querySelector('#edited bdi')?.textContent === arguments[0]", steered)
        assert not browser.errors()
        inside = ("http://127.0.0.1", "data:", "about:", "blob:", "chrome")
        assert not [url for url in browser.requests() if not url.startswith(inside)]
