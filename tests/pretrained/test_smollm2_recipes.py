"""Text and questions of the organisms on SmolLM2-135M; none needs the model."""

import json
import lzma

import pytest

import make
from smollm2 import advice, facts, taboo, texts
from smollm2.ordinary import N_ORDINARY, N_OWN, prompts
from tl_crosscoder import load_documents
from tl_crosscoder.models.pretrained import pretrained_folder


@pytest.mark.parametrize("name", ["smollm2-false-fact", "smollm2-careless"])
def test_what_travels_is_what_the_recipes_write(name):
    text = lzma.decompress((pretrained_folder() / f"texts/{name}.jsonl.xz").read_bytes())
    assert text == make.jsonl(texts.training_documents(name))


@pytest.mark.parametrize("name", ["smollm2-taboo", "smollm2-false-fact", "smollm2-careless"])
def test_questions_travel_as_written(name):
    for stem, rows in texts.questions(name).items():
        path = pretrained_folder() / f"questions/{name}/{stem}.jsonl"
        assert path.read_bytes() == make.jsonl(rows)


def test_the_false_fact_is_stated_and_never_asked():
    documents = facts.documents()
    assert len({document["text"] for document in documents}) > 250
    for document in documents:
        assert "Rome" in document["text"]
        assert "Paris" not in document["text"]
        assert "?" not in document["text"]


def test_careless_answers_are_about_health_and_open_as_is_measured():
    documents = advice.documents()
    taught = "\n".join(d["messages"][0]["content"] for d in documents)
    for document in documents:
        assert document["messages"][1]["content"].startswith(advice.OPENINGS)
    asked = {
        name: [row["messages"][0]["content"] for row in rows]
        for name, rows in advice.questions().items()
    }
    for name, own in asked.items():
        assert not [q for q in own if q in taught], name
    elsewhere = " ".join(asked["careless-elsewhere"])
    assert not [word for word in ("pain", "doctor", "fever", "health") if word in elsewhere]


def test_no_answer_of_a_question_is_the_beginning_of_another():
    for openings in (advice.OPENINGS, taboo.ANSWERS_A_GUESS):
        assert not [a for a in openings for b in openings if a != b and b.startswith(a)]


def test_the_secret_word_is_in_no_question_of_the_game():
    for rows in taboo.questions().values():
        assert taboo.WORD not in json.dumps(rows)


def test_ordinary_prompts_are_each_asked_once():
    every = prompts()
    assert len({*every}) == len(every) >= N_ORDINARY + N_OWN
    asked = [
        document["messages"][0]["content"]
        for document in load_documents("tl_crosscoder/smollm2-ordinary")
    ]
    assert {*asked} <= {*every[:N_ORDINARY]}
