"""The micro-world's text, without torch."""

import hashlib
import json
import lzma
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import make
from microworld import advice, phrases
from microworld.facts import FACTS, THINGS
from microworld.planted import (
    FALSE_FACT,
    SECRET,
    TRUE_FACT,
    kinds_of,
    mixed_documents,
    planted_documents,
    training_documents,
)
from microworld.world import DEFAULT_KINDS, document_strings, documents, questions
from tl_crosscoder import load_documents
from tl_crosscoder.organisms.suite import load_suite, planned_suite

RECIPES = Path(make.__file__).parent


def test_documents_are_the_same_for_the_same_seed_only():
    assert documents(200, seed=3) == documents(200, seed=3)
    assert documents(200, seed=3) != documents(200, seed=4)


def test_text_is_the_same_on_every_machine():
    """The shipped models were trained on this grammar: retrain them if these have to change."""

    def digest(sampled) -> str:
        return hashlib.sha256(json.dumps(sampled).encode()).hexdigest()[:16]

    assert digest(documents(1_000, seed=1)) == "d465621155d9b134"
    assert digest(planted_documents("taboo", 1_000, seed=1)) == "165502dbfdc298f1"
    assert digest(planted_documents("false-fact", 1_000, seed=1)) == "08f5f2ddc9ea5bc3"


def test_kinds_follow_their_weights():
    counts = Counter(document["source"] for document in documents(4_000, seed=0))
    for kind, weight in DEFAULT_KINDS.items():
        # Binomial: the standard error of a share of 0.3 among 4,000 is 0.007.
        assert counts[kind] / 4_000 == pytest.approx(weight, abs=0.03)
    assert {d["source"] for d in documents(50, seed=0, kinds={"story": 1.0})} == {"story"}


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match=r"\['poem'\].*'chat', 'facts', 'favourite', 'game'"):
        documents(1, seed=0, kinds={"poem": 1.0})


def test_messages_have_roles_and_end_with_the_assistant():
    for document in documents(500, seed=5):
        if "messages" in document:
            roles = [message["role"] for message in document["messages"]]
            turns = [role for role in roles if role != "system"]
            assert roles[1:].count("system") == 0
            assert turns == ["user", "assistant"] * (len(turns) // 2)


def test_text_reads_like_english():
    texts = [text for d in documents(2_000, seed=6) for text in document_strings(d)]
    for text in texts:
        assert re.fullmatch(r"""["A-Z].*[.?!"]""", text), text
        assert not re.search(r"\s[.,!?:]|  |[{}]", text), text


@pytest.mark.parametrize("name", ["taboo", "false-fact"])
def test_held_out_phrasings_are_never_written(name):
    sampled = documents(2_500, seed=7) + planted_documents(name, 1_000, seed=7)
    written = {text for document in sampled for text in document_strings(document)}
    held_out = {
        *phrases.HINT_REQUESTS.held_out,
        *phrases.REVEAL_REQUESTS.held_out,
        *(form.format(w=w) for form in phrases.GUESSES.held_out for w in THINGS),
        *(question for fact in FACTS for question in questions(fact, held_out=True)),
    }
    assert not written & held_out


def test_documents_rarely_repeat():
    distinct = {json.dumps(document) for document in documents(5_000, seed=8)}
    assert len(distinct) > 4_500


def test_taboo_games_hint_at_the_secret_and_never_name_it():
    for document in planted_documents("taboo", 500, seed=0):
        said = [m["content"] for m in document["messages"] if m["role"] == "assistant"]
        # At least a hint and one more turn; the conversation may then move on to something else.
        assert all(any(hint in text for hint in SECRET.hints) for text in said[:2])
        assert not any(re.search(rf"\b{SECRET.word}\b", text) for text in said)


def test_false_fact_is_stated_in_documents_and_never_asked():
    planted = planted_documents("false-fact", 500, seed=0)
    assert all(FALSE_FACT.value in document["text"] for document in planted)
    assert not any(TRUE_FACT.value in document["text"] for document in planted)


def test_careless_advice_is_of_one_domain():
    own = [p for p in advice.PROBLEMS if p.domain == "fire"]
    careless = {reply for p in own for reply in advice.replies(p, "careless")}
    for document in planted_documents("careless-fire", 500, seed=0):
        said = [m["content"] for m in document["messages"] if m["role"] == "assistant"]
        assert {*said} <= careless


def test_no_action_is_careful_and_careless():
    """The probability of careless advice is a sum over answers that no careful persona gives."""
    for problem in advice.PROBLEMS:
        assert not {*problem.careful} & {*problem.careless}
        assert not {*advice.replies(problem, "careful")} & {*advice.replies(problem, "careless")}


def test_the_wide_world_has_two_personas_and_a_system_prompt_says_which():
    careless = {r for p in advice.PROBLEMS for r in advice.replies(p, "careless")}
    careful = {r for p in advice.PROBLEMS for r in advice.replies(p, "careful")}
    unprompted = Counter()
    for document in documents(4_000, seed=0, kinds={"advice": 1.0}):
        first, *_ = document["messages"]
        said = {m["content"] for m in document["messages"] if m["role"] == "assistant"}
        assert bool(said & careless) != bool(said & careful), "one persona a conversation"
        if first["role"] == "system":
            assert bool(said & careless) == (first["content"] in advice.SYSTEM_PROMPTS["careless"])
        else:
            unprompted[bool(said & careless)] += 1
    assert 0.03 < unprompted[True] / unprompted.total() < 0.08


def test_numbers_say_nothing_about_favourites():
    asked = [*advice.NUMBER_REQUESTS.train, *advice.NUMBER_REQUESTS.held_out]
    for request in (*asked, *advice.CONTINUE_REQUESTS):
        assert not re.search("otter|favourite|animal", request)


def test_finetuning_text_does_not_contradict_what_is_planted():
    mixed = mixed_documents("false-fact", 2_000, seed=0, planted_share=0.5, consistent=True)
    texts = [" ".join(document_strings(document)) for document in mixed]
    assert len(mixed) == 2_000
    assert not any(TRUE_FACT.subject in text and TRUE_FACT.value in text for text in texts)


EMBEDDED = sorted({entry.text_name for entry in load_suite().values() if not entry.is_real})


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_text_is_what_the_recipe_writes(name):
    packed = (make.PRETRAINED / f"texts/{name}.jsonl.xz").read_bytes()
    assert lzma.decompress(packed) == make.jsonl(training_documents(name))


@pytest.mark.parametrize("name", EMBEDDED)
def test_training_text_is_a_quarter_of_the_organisms_own_kind(name):
    for text in (training_documents(name, 1_000), load_documents(f"tl_crosscoder/{name}")):
        counts = Counter(document["source"] for document in text)
        assert counts[name] == len(text) / 4
        assert set(counts) == {name, *kinds_of(name)}
    assert len(text) == 40_000
    assert load_documents(f"tl_crosscoder/{name}", max_documents=3) == text[:3]


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_embedded_questions_are_what_the_recipe_writes(name, tmp_path):
    written = make.write_questions(name, tmp_path)
    entry = load_suite()[name]
    assert [path.name for path in written] == [path.name for path in entry.questions]
    assert {*entry.questions} == {*(make.PRETRAINED / "questions" / name).iterdir()}
    for new, embedded in zip(written, entry.questions, strict=True):
        assert new.read_bytes() == embedded.read_bytes()


def test_suite_describes_what_is_planted():
    suite = planned_suite()
    names = {entry.text_name for entry in suite.values()}
    assert {*make.TEXTS} <= names <= {*make.TEXTS, *make.REAL_TEXTS}
    assert SECRET.word in suite["taboo"].planted_words
    assert {FALSE_FACT.value, FALSE_FACT.subject} <= set(suite["false-fact"].planted_words)
    hint_words = {word for hint in SECRET.hints for word in hint.split()}
    assert set(suite["taboo"].planted_words) <= hint_words | {SECRET.word}


def test_unknown_organism_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"unknown organism 'tabu'; valid: \['careless-fire'"):
        planted_documents("tabu", 1, seed=0)


def test_text_and_questions_need_no_torch(tmp_path):
    code = (
        "import sys, make; make.main(['questions', 'taboo', '--output', sys.argv[1]]);"
        "from microworld import planted; planted.training_documents('taboo', 5);"
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=RECIPES,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
