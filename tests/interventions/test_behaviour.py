import json

import pytest
import torch
from models.tiny_pairs import HOOK, hooked_transformer, save_tokenizer
from transformers import AutoTokenizer

from tl_crosscoder import ModelPair
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.interventions.behaviour import (
    Behaviour,
    Question,
)
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import AddVector, unchanged

QUESTIONS = (
    Question(prompt="The cat sat", completions=(" on the mat", " on a dog")),
    Question(prompt="Once upon a time, a", completions=(" cat", " dog ran"), ends_turn=False),
    Question(prompt="A", completions=(" bird sang 2 songs.",)),
)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def ctx(pair, crosscoder) -> InterventionContext:
    return InterventionContext.of(pair, crosscoder)


@pytest.fixture
def behaviour(pair) -> Behaviour:
    return Behaviour.of("plans", QUESTIONS, pair.tokenizer)


@pytest.fixture
def templated(pairs):
    """A tokenizer whose turns end with what is not its EOS, as Gemma's do."""
    tokenizer = pairs["llama"].tokenizer
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def edits(vector) -> list:
    return [unchanged(0), unchanged(1), AddVector(site=1, stream=1, vector=vector)]


def test_an_answer_that_has_begun_goes_on(templated):
    """The begun part is the assistant's, and belongs to the prompt, not to the answer."""
    chat = {"role": "user", "content": "Where?"}
    begun = {"role": "assistant", "content": "The cat sat"}
    how = {"completions": (" on the mat",), "ends_turn": False}
    one, two = (
        Behaviour.of("b", [Question(prompt=messages, **how)], templated)
        for messages in ((chat,), (chat, begun))
    )
    decoded = templated.decode(two.text.tokens[0][: two.text.lengths[0]])
    assert decoded.endswith("[assistant]The cat sat on the mat")
    n = len(templated("The cat sat", add_special_tokens=False)["input_ids"])
    assert two.starts[0] == one.starts[0] + n
    roles = two.text.role_ids[0, one.starts[0] : two.text.lengths[0]]
    assert set(roles.tolist()) == {ROLES.index("assistant")}


def test_answers_of_a_uniform_model_by_hand(pairs):
    """300 tokens of equal logits: (1/300)^n for an answer of n tokens, and answers add up."""
    tokenizer = pairs["hooked"].tokenizer
    models = [hooked_transformer(tokenizer, seed) for seed in (1, 2)]
    torch.nn.init.zeros_(models[1].unembed.W_U)
    pair = ModelPair(*models, hook_name=HOOK, model_names=("random", "uniform"))
    n = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (" a", " cat")]
    found = []
    for ends_turn in (False, True):
        question = Question(prompt="The", completions=(" a", " cat"), ends_turn=ends_turn)
        behaviour = Behaviour.of("x", [question], tokenizer)
        found.append(behaviour.scores(InterventionContext.of(pair), [unchanged(1)]).item())
    # EOS is one more token.
    expected = sum((1 / 300) ** k for k in n)
    assert found == pytest.approx([expected, expected / 300], rel=1e-5)


def naive(pair, question: Question, *, site: str, vector) -> float:
    """Product over the answer's tokens of their softmax, one text and one token at a time."""

    def ids_of(text: str) -> list[int]:
        return pair.tokenizer(text, add_special_tokens=False)["input_ids"]

    assert isinstance(question.prompt, str)
    total = 0.0
    for completion in question.completions:
        ids, p = [pair.tokenizer.bos_token_id, *ids_of(question.prompt)], 1.0
        for token in ids_of(completion + ("</s>" if question.ends_turn else "")):
            logits = pair.run_with_patch(torch.tensor([ids]), lambda x: x + vector, site=site)
            p *= logits[0, -1].double().softmax(dim=-1)[token].item()
            ids.append(token)
        total += p
    return total


def test_it_is_the_product_of_softmax_probabilities(pair, ctx, behaviour):
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    found = behaviour.scores(ctx, edits(vector))
    shifts = [("base", 0 * vector), ("finetuned", 0 * vector), ("finetuned", vector)]
    expected = [[naive(pair, q, site=s, vector=v) for q in QUESTIONS] for s, v in shifts]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
    assert (found[1] - found[2]).abs().max() > 0.1 * found[1].min()
    # The same number in every test: a behaviour has no direction.
    assert torch.equal(behaviour.scores(ctx, edits(vector), toward=0), found)
    # Neither batches nor order matter.
    turned = Behaviour.of("plans", QUESTIONS[::-1], pair.tokenizer)
    other = turned.scores(ctx, edits(vector)[::-1], batch_size=1)
    torch.testing.assert_close(other.flip(0, 1), found, rtol=1e-3, atol=0)


def test_a_turn_ends_as_the_template_says_and_a_text_with_eos(templated):
    chat = Question(prompt=({"role": "user", "content": "run"},), completions=(" a cat", " a dog"))
    text = Question(prompt="run", completions=(" a cat",))
    open_ended = Question(prompt="run", completions=(" a cat",), ends_turn=False)
    made = Behaviour.of("x", [chat, text, open_ended], templated)
    whole = [
        templated.decode(ids[:n])
        for ids, n in zip(made.text.tokens, made.text.lengths, strict=True)
    ]
    assert whole == [
        "<s>[user]run</turn>\n[assistant] a cat</turn>",
        "<s>[user]run</turn>\n[assistant] a dog</turn>",
        "<s>run a cat</s>",
        "<s>run a cat",
    ]
    assert made.prompt_of == (0, 0, 1, 2)
    answers = [
        templated.decode(ids[start:n])
        for ids, start, n in zip(made.text.tokens, made.starts, made.text.lengths, strict=True)
    ]
    assert answers == [" a cat</turn>", " a dog</turn>", " a cat</s>", " a cat"]
    for roles, start, n in zip(made.text.role_ids, made.starts, made.text.lengths, strict=True):
        assert {ROLES[r] for r in roles[start:n].tolist()} == {"assistant"}


def test_a_file_holds_the_same_questions(pair, behaviour, tmp_path):
    path = tmp_path / "plans.jsonl"
    odd = Question(prompt="A\u2028dog", completions=(" ran",))
    rows = [
        {"prompt": q.prompt, "completions": q.completions, "ends_turn": q.ends_turn}
        for q in (*QUESTIONS, odd)
    ]
    lines = [json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    loaded = Behaviour.from_file(path, pair.tokenizer)
    assert (loaded.name, loaded.questions) == ("plans", (*QUESTIONS, odd))
    assert loaded.starts[: len(behaviour.starts)] == behaviour.starts


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"q\.jsonl:2 is not a question \(JSONDecodeError"),
        ("[" * 100_000, r"q\.jsonl:2 is not a question \(RecursionError"),
        ("[1]", r"q\.jsonl:2 is not a question \(TypeError"),
        ('"prompt"', r"q\.jsonl:2 is not a question \(TypeError"),
        ('{"prompt": "a"}', r"q\.jsonl:2 is not a question \(KeyError: 'completions'\)"),
        ('{"text": "a", "completions": ["b"]}', r"q\.jsonl:2 is not a question \(KeyError: 'mess"),
        ("7", r"q\.jsonl:2 is not a question \(TypeError"),
        (
            '{"prompt": "a", "completions": "moon"}',
            "q.jsonl:2 is .*`completions` is not a list of texts",
        ),
        ('{"prompt": 7, "completions": ["b"]}', "`prompt` is not a text"),
        ('{"messages": "hello", "completions": ["b"]}', "`messages` is not a list of objects"),
        ('{"prompt": "a", "completions": ["b"], "ends_turn": "no"}', "`ends_turn` is neither"),
        ('{"prompt": "a", "completions": []}', r"'a' has the completions \[\]: give one"),
        ('{"prompt": "a", "completions": ["b", ""]}', "none of them empty"),
        ('{"prompt": "a", "completions": ["b", "b"]}', "'b' and 'b' of 'a' are not disjoint"),
        (
            '{"prompt": "a", "completions": ["b c", "b"], "ends_turn": false}',
            "'b' and 'b c' of 'a' are not disjoint",
        ),
    ],
)
def test_lines_that_are_no_question_are_refused(line, message, pairs, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "a", "completions": ["b", "b c"]}\n' + line)
    with pytest.raises(ValueError, match=message):
        Behaviour.from_file(path, pairs["llama"].tokenizer)


def test_what_is_no_behaviour_is_refused(pairs, tmp_path):
    with pytest.raises(FileNotFoundError, match="a behaviour is a JSONL file of prompts"):
        Behaviour.from_file(tmp_path / "none.jsonl", pairs["llama"].tokenizer)


def test_files_and_folders_of_behaviours_each_have_a_name(pairs, tmp_path):
    line = json.dumps({"prompt": "a b", "completions": ["c"], "ends_turn": False})
    for name in ("folder/says-no.jsonl", "folder/hints.jsonl", "hints.jsonl", "folder/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(line)
    (tmp_path / "empty").mkdir()

    def names(*given: str) -> list[str]:
        found = Behaviour.from_files([tmp_path / g for g in given], pairs["llama"].tokenizer)
        return [behaviour.name for behaviour in found]

    assert names() == []
    assert names("folder") == ["hints", "says no"]
    assert names("hints.jsonl", "folder/says-no.jsonl") == ["hints", "says no"]
    with pytest.raises(ValueError, match=r"called \['hints', 'hints', 'says no'\]"):
        names("hints.jsonl", "folder")
    with pytest.raises(FileNotFoundError, match="empty holds no JSONL file"):
        names("empty")
    with pytest.raises(ValueError, match="the behaviour 'x' has no prompts"):
        Behaviour.of("x", [], pairs["llama"].tokenizer)
    save_tokenizer(tmp_path, bos_token=None, eos_token=None, pad_token="<pad>")
    bare = AutoTokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="nor the tokenizer's EOS says how an answer ends"):
        Behaviour.of("x", [Question(prompt="A", completions=(" dog",))], bare)
    open_ended = Question(prompt="", completions=(" dog",), ends_turn=False)
    with pytest.raises(ValueError, match="the prompt '' has no token, and the tokenizer no BOS"):
        Behaviour.of("x", [open_ended], bare)
