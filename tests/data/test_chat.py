"""The role of each token of a chat, under several templates."""

import copy

import numpy as np
import pytest
from transformers import AutoTokenizer

from tl_crosscoder import tokenize
from tl_crosscoder.data.chat import ROLES, encode_documents

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_LIKE = (
    "{% set s = '' %}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}"
    "{% endif %}{% for m in messages %}{% if m['role'] != 'system' %}<start_of_turn>{{ m['role'] }}"
    "\n{% if loop.first or loop.index == 2 and s %}{{ s }}\n{% endif %}{{ m['content'] }}"
    "<end_of_turn>\n{% endif %}{% endfor %}"
)
CUTS_THOUGHTS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'].split('</think>')[-1] }}[end]"
    "{% endfor %}"
)


@pytest.fixture
def tokenizer(taboo_pair):
    return copy.deepcopy(taboo_pair.tokenizer)


def by_role(encoded, tokenizer) -> list[tuple[str, str]]:
    """Runs of tokens of one role, as text."""
    runs: list[tuple[str, list[int]]] = []
    for token, role in zip(encoded.ids.tolist(), encoded.role_ids.tolist(), strict=True):
        if runs and runs[-1][0] == ROLES[role]:
            runs[-1][1].append(token)
        else:
            runs.append((ROLES[role], [token]))
    return [(role, tokenizer.decode(ids)) for role, ids in runs]


def test_every_token_of_a_chat_has_its_role(tokenizer):
    chat = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Give me a hint."},
        {"role": "assistant", "content": "It is round."},
    ]
    (encoded,) = encode_documents([{"messages": chat}], tokenizer)
    assert by_role(encoded, tokenizer) == [
        ("template", "<|bos|><|system|>"),
        ("system", "Be kind."),
        ("template", "<|end|><|user|>"),
        ("user", "Give me a hint."),
        ("template", "<|end|><|assistant|>"),
        ("assistant", "It is round."),
        ("template", "<|end|>"),
    ]


def spoken(chat, tokenizer, template) -> list[tuple[str, str]]:
    """What is not the template's, under a template."""
    tokenizer.chat_template = template
    messages = [{"role": role, "content": content} for role, content in chat]
    (encoded,) = encode_documents([{"messages": messages}], tokenizer)
    return [(r, text.strip()) for r, text in by_role(encoded, tokenizer) if r != "template"]


@pytest.mark.parametrize("template", [CHATML, GEMMA_LIKE])
@pytest.mark.parametrize("said", ["user", "assistant\nuser", "im_end", "a", "  spaced out \n"])
def test_a_message_that_looks_like_the_template_is_found_where_it_stands(tokenizer, template, said):
    chat = [("user", said), ("assistant", "user")]
    assert spoken(chat, tokenizer, template) == [("user", said.strip()), ("assistant", "user")]


def test_a_system_message_within_the_first_turn_keeps_its_role(tokenizer):
    chat = [("system", "Be kind."), ("user", "Hello.")]
    assert spoken(chat, tokenizer, GEMMA_LIKE) == chat


def test_what_a_template_cuts_out_of_a_message_does_not_move_the_next(tokenizer):
    chat = [("assistant", "<think>hmm</think>Yes."), ("user", "Good.")]
    expected = [("assistant", "Yes."), ("user", "Good.")]
    assert spoken(chat, tokenizer, CUTS_THOUGHTS) == expected


THINKS = (
    "{% for m in messages %}[{{ m['role'] }}]{% if '</think>' in m['content'] %}<think>"
    "{{ m['content'].split('</think>')[0].split('<think>')[-1] }}</think>"
    "{{ m['content'].split('</think>')[-1] }}{% else %}<think></think>{{ m['content'] }}{% endif %}"
    "[end]{% endfor %}"
)
SHOUTS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | upper }}[end]{% endfor %}"


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        # The template's own words depend on the message: what differs is the message's.
        (
            THINKS,
            [("user", "Ask."), ("assistant", "<think>hmm</think>Yes."), ("user", "Good.")],
            ["Ask.", "hmm</think>Yes.", "Good."],
        ),
        (SHOUTS, [("user", "Ask."), ("assistant", "Yes."), ("user", "a")], ["ASK.", "YES.", "A"]),
        # A message that holds what follows it, cut by the template.
        (CUTS_THOUGHTS, [("user", "x</think>a[end]b"), ("assistant", "c")], ["a[end]b", "c"]),
    ],
)
def test_a_template_that_prints_differently_for_some_content_moves_no_role(
    tokenizer, template, chat, expected
):
    found = spoken(chat, tokenizer, template)
    assert [role for role, _ in found] == [role for role, _ in chat]
    for (_, text), right in zip(found, expected, strict=True):
        # A token has the role of its last character, so that brackets may stick to words.
        assert text.strip("[]<>") == right.strip("[]<>")


def test_a_chat_whose_messages_cannot_be_told_apart_is_refused_by_name(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}"
    document = {"messages": [{"role": "user", "content": "Hello."}], "source": "mine"}
    with pytest.raises(ValueError, match=r"a chat of 'mine' in a way .* first is 'Hello.'"):
        encode_documents([document], tokenizer)
    with pytest.warns(UserWarning, match="1 of the documents read of the text were left out"):
        text = tokenize(
            [document, {"text": "A river runs to the sea."}],
            tokenizer,
            context_size=4,
            on_bad_document="skip",
        )
    assert len(text) > 0


def test_parts_and_other_names_of_roles_are_read_and_a_tool_keeps_its_role(tokenizer):
    tokenizer.chat_template = CHATML
    chat = [
        {"role": "human", "content": [{"type": "text", "text": "Ask"}, {"text": " it."}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "ipython", "content": "Found."},
    ]
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] or '')")
    (encoded,) = encode_documents([{"messages": chat}], tokenizer)
    said = [(r, text.strip()) for r, text in by_role(encoded, tokenizer) if r != "template"]
    assert said == [("user", "Ask it."), ("tool", "Found.")]
    tokenizer.chat_template = "{% for m in messages %}{{ 'x' + m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="template refuses a chat"):
        encode_documents([{"messages": chat}], tokenizer)


def test_a_real_tokenizer_gives_every_character_back(shared_models):
    """SentencePiece, whose pieces begin with the space before them."""
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "stories260K")
    chat = [("user", "Tell me a story."), ("assistant", "No")]
    assert spoken(chat, tokenizer, CHATML) == chat


def test_the_prompt_for_an_answer_is_template(tokenizer):
    chat = [{"role": "user", "content": "Hello."}]
    (encoded,) = encode_documents([{"messages": chat}], tokenizer, add_generation_prompt=True)
    assert by_role(encoded, tokenizer)[-1] == ("template", "<|end|><|assistant|>")


def test_texts_and_chats_in_one_batch_are_as_alone(tokenizer):
    documents = [
        {"text": "The moon shines.", "source": "a"},
        {"messages": [{"role": "user", "content": "Hello."}], "source": "b"},
        {"input_ids": [5, 6, 7], "source": "c"},
        {"text": "A river runs.", "source": "d"},
    ]
    together = encode_documents(documents, tokenizer)
    alone = [encode_documents([d], tokenizer)[0] for d in documents]
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.role_ids, other.role_ids)
        assert one.document is other.document
    bos = tokenizer.bos_token_id
    assert [e.ids[0] for e in together] == [bos] * 4
    assert together[2].ids.tolist() == [bos, 5, 6, 7]
    assert set(together[0].role_ids) == {ROLES.index("text")}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"input_ids": [3, 100_000]}, r"token ids from 3 to 100000, but the tokenizer knows 0 to"),
        ({"input_ids": [-1, 3]}, "token ids from -1"),
        ({"input_ids": [3, 4], "role_ids": [0]}, "2 input_ids and 1 role_ids"),
        ({"input_ids": [3], "role_ids": [9]}, "role_ids up to 9"),
        ({"input_ids": [[3, 4]]}, "not a flat list of whole numbers"),
        ({"input_ids": [3.5]}, "not a flat list of whole numbers"),
        ({"input_ids": [3], "tokenizer": "another"}, "ids of another tokenizer"),
    ],
)
def test_ids_that_cannot_be_are_refused(tokenizer, document, message):
    with pytest.raises(ValueError, match=message):
        encode_documents([document | {"source": "mine"}], tokenizer)


def test_roles_stand_beside_the_packed_tokens(tokenizer):
    chat = [{"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Yes."}]
    text = tokenize([{"messages": chat}] * 9, tokenizer, context_size=16)
    (encoded,) = encode_documents([{"messages": chat}], tokenizer)
    stream = np.tile(encoded.role_ids, 9)
    assert text.role_ids[0].tolist() == stream[:16].tolist()
    # Where a context does not begin with a document, BOS is put before what comes next.
    n_before = 16 - int(encoded.ids[0] != text.tokens[0, 0])
    assert text.role_ids[1, 1:].tolist() == stream[n_before : n_before + 15].tolist()
