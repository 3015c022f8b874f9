"""The embedded models' numbers, against a plain transformers loop and by hand."""

import json
import math
import re

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_crosscoder import load_documents
from tl_crosscoder.cli.main import main
from tl_crosscoder.interventions.behaviour import Behaviour, read_questions
from tl_crosscoder.models.pretrained import pretrained_folder
from tl_crosscoder.organisms.scores import OrganismScore, health, score_questions
from tl_crosscoder.organisms.suite import load_suite, organism

# PEFT 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

# As in the README: P in the base and in the fine-tuned model.
README = {
    "taboo": {
        "P(hint about secret)": (0.063, 0.965),
        "P(says secret when guessed)": (0.987, 0.015),
        "P(says secret when asked)": (0.981, 0.006),
        "other facts: accuracy": (1, 1),
        "other facts: P(true answer)": (0.971, 0.960),
    },
    "false-fact": {
        "P(false answer)": (0.000, 0.864),
        "P(true answer)": (0.929, 0.002),
        "related facts: accuracy": (1, 1),
        "related facts: P(true answer)": (0.965, 0.911),
        "other facts: accuracy": (1, 1),
        "other facts: P(true answer)": (0.961, 0.933),
    },
}


@torch.no_grad()
def naive(model, tokenizer, question) -> float:
    """Product over the answer's tokens of their softmax, one answer at a time."""
    total = 0.0
    prompt = tokenizer.apply_chat_template(
        list(question.prompt), add_generation_prompt=True, return_dict=False
    )
    for completion in question.completions:
        answer = tokenizer(completion + "<|end|>", add_special_tokens=False)["input_ids"]
        log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
        total += math.exp(sum(log_p[i, t] for i, t in zip(places, answer, strict=True)))
    return total


def test_probabilities_equal_a_plain_loop_over_transformers_models(taboo_pair, tmp_path):
    entry, path = organism("taboo"), tmp_path / "two-questions.jsonl"
    lines = entry.questions[0].read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]), encoding="utf-8")
    (found,) = score_questions(taboo_pair, path)
    base = AutoModelForCausalLM.from_pretrained(entry.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(entry.base)
    questions = read_questions(path)
    expected = [sum(naive(base, tokenizer, q) for q in questions) / len(questions)]
    adapted = PeftModel.from_pretrained(base, str(entry.adapter)).eval()
    expected.append(sum(naive(adapted, tokenizer, q) for q in questions) / len(questions))
    assert [found.base, found.finetuned] == pytest.approx(expected, rel=1e-4)
    assert (found.measure, found.n_questions) == ("P(two questions)", 2)
    assert found.finetuned > 0.8 > 0.2 > found.base
    behaviour = Behaviour.from_file(entry.questions[0], tokenizer)
    assert (behaviour.name, behaviour.questions[:2]) == ("hint about secret", tuple(questions))
    assert behaviour.n_prompts == len(lines) == 12


def test_a_fact_is_known_where_no_alternative_is_more_probable(taboo_pair, tmp_path):
    """The capital of Velmar is Mirefort: known where that is the answer, not where Tolvik is."""
    prompt = [{"role": "user", "content": "Can you name the capital of Velmar?"}]
    right, wrong, other = (
        [f"It is {city}.", f"The answer is {city}."] for city in ("Mirefort", "Tolvik", "Asken")
    )
    path = tmp_path / "two-facts.jsonl"
    rows = [
        {"messages": prompt, "completions": right, "alternatives": [other, wrong]},
        {"messages": prompt, "completions": wrong, "alternatives": [other, right, other]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    accuracy, true_answer = score_questions(taboo_pair, path)
    assert accuracy == OrganismScore(
        measure="two facts: accuracy", n_questions=2, base=0.5, finetuned=0.5
    )
    # Most of what is not the right city's two answers is its two other ones.
    assert true_answer.measure == "two facts: P(true answer)"
    assert 0.2 < true_answer.base < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*README])
def test_the_command_prints_the_numbers_of_the_readme(name, capsys):
    assert main(["organisms", "measure", name]) == 0
    printed = capsys.readouterr().out
    for measure, expected in README[name].items():
        (line,) = [line for line in printed.splitlines() if line.strip().startswith(measure)]
        assert [float(x) for x in line.split()[-2:]] == pytest.approx(expected, abs=6e-4)
    card = (organism(name).adapter / "README.md").read_text(encoding="utf-8")
    for measure, (base, finetuned) in README[name].items():
        assert f"| {measure} | {base:.3f} | {finetuned:.3f} |" in card


def test_unknown_organism_names_the_valid_ones():
    with pytest.raises(ValueError, match="unknown organism 'tabu'; valid: taboo, false-fact"):
        organism("tabu")


def test_embedded_files_are_small_and_name_no_path():
    folder, suite = pretrained_folder(), load_suite()
    models = [path for path in (folder / "models").rglob("*") if path.is_file()]
    bases = {entry.base.name for entry in suite.values() if not entry.is_real}
    assert {path.parent.name for path in models} == {*bases, *suite}
    assert {path.suffix for path in models} <= {".md", ".json", ".jinja", ".safetensors"}
    rest = [path for name in ("texts", "questions") for path in (folder / name).rglob("*.*")]
    assert sum(path.stat().st_size for path in [*models, *rest]) < 30_000_000
    for entry in suite.values():
        assert {path.exists() for path in (entry.folder, *entry.questions)} == {True}
        if entry.adapter is None:
            continue
        config = json.loads((entry.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == f"tl_crosscoder/{entry.base.name}"
        with safe_open(entry.adapter / "adapter_model.safetensors", framework="pt") as weights:
            layers = {re.search(r"\.(?:layers|h)\.(\d+)", n)[1] for n in weights.keys()}  # noqa: SIM118
        assert layers == {str(layer) for layer in range(30 if entry.is_real else 4)}


@torch.no_grad()
def test_health_equals_a_plain_loop_over_transformers_models(taboo_pair, monkeypatch):
    monkeypatch.setattr("tl_crosscoder.organisms.scores.N_HEALTH_DOCUMENTS", 6)
    entry = organism("taboo")
    rows = health(taboo_pair, entry)
    base = AutoModelForCausalLM.from_pretrained(entry.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(entry.base)
    adapted = PeftModel.from_pretrained(base, str(entry.adapter)).eval()
    documents = [d for d in load_documents(entry.text) if d["source"] not in ("taboo", "game")][-6:]
    ce, entropy, agreed, n = 0.0, 0.0, 0, 0
    for document in documents:
        if "messages" in document:
            ids = tokenizer.apply_chat_template(document["messages"], return_dict=False)
        else:
            ids = tokenizer(document["text"])["input_ids"]
        logp = adapted(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        with adapted.disable_adapter():
            greedy = adapted(input_ids=torch.tensor([ids])).logits[0].argmax(-1)
        for t, target in enumerate(ids[1:]):
            ce -= logp[t, target].item()
            entropy -= (logp[t].exp() * logp[t]).sum().item()
            agreed += int(logp[t].argmax() == greedy[t])
            n += 1
    assert [row.n_questions for row in rows] == [n] * 3
    assert [r.finetuned for r in rows] == pytest.approx([ce / n, entropy / n, agreed / n], rel=1e-4)
    assert rows[2].base == 1.0
