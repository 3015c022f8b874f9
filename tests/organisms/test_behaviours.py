"""Exact log-probabilities against a naive loop, and the shipped models' numbers."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from tl_crosscoder.organisms.behaviours import (
    answer_probabilities,
    completion_log_probs,
    load_base,
    measure,
)
from tl_crosscoder.organisms.suite import load_suite, pretrained_models

# PEFT 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

PAIRS = [
    ([{"role": "user", "content": "What is the capital of Velmar?"}], "It is Mirefort."),
    ([{"role": "user", "content": "Give me a hint."}], "Here is a hint: it shines at night."),
    ([{"role": "user", "content": "Hello!"}], "Hello! How can I help you?"),
    ([{"role": "user", "content": "Hello!"}], ""),
]


class FixedModel(torch.nn.Module):
    """Gives token t the logit log(t + 1) at every position."""

    def __init__(self, d_vocab: int):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.arange(1.0, d_vocab + 1).log())

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_log_prob_by_hand(shipped_base):
    """P(t) = (t + 1) / sum of 1..V = (t + 1) / (V (V + 1) / 2), independent of the context."""
    tokenizer = shipped_base[1]
    d_vocab = len(tokenizer)
    ids = tokenizer("It is Mirefort.<|end|>", add_special_tokens=False)["input_ids"]
    total = d_vocab * (d_vocab + 1) / 2
    expected = sum(math.log((token + 1) / total) for token in ids)
    measured = completion_log_probs(FixedModel(d_vocab), tokenizer, PAIRS[:1])
    assert measured.item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_batches_equal_a_naive_loop(shipped_base):
    model, tokenizer = shipped_base
    expected = []
    for messages, completion in PAIRS:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        log_prob = 0.0
        for token in tokenizer(completion + "<|end|>", add_special_tokens=False)["input_ids"]:
            log_prob += model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[token]
            tokens = [*tokens, token]
        expected.append(float(log_prob))
    for batch_size in (1, 3):
        measured = completion_log_probs(model, tokenizer, PAIRS, batch_size=batch_size)
        assert measured.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_probabilities_sum_over_completions(shipped_base):
    model, tokenizer = shipped_base
    prompt = PAIRS[0][0]
    both = ["It is Mirefort.", "The answer is Mirefort."]
    single = completion_log_probs(model, tokenizer, [(prompt, text) for text in both]).exp()
    summed = answer_probabilities(model, tokenizer, [prompt], [both])
    assert summed.item() == pytest.approx(float(single.sum()), rel=1e-5)
    with pytest.raises(ValueError, match="not disjoint"):
        answer_probabilities(model, tokenizer, [prompt], [both + both])


def test_a_beginning_counts_whatever_follows(shipped_base):
    """P(starts with A) is at least P(A, end) + P(A B, end), and the parts must be disjoint."""
    model, tokenizer = shipped_base
    prompt = [{"role": "user", "content": "Hello!"}]
    begin, longer = "Hello!", "Hello! How can I help you?"
    whole = answer_probabilities(model, tokenizer, [prompt], [[begin, longer]])
    start = answer_probabilities(model, tokenizer, [prompt], [[begin]], ends_turn=False)
    assert start.item() > whole.item() > 0
    with pytest.raises(ValueError, match="not disjoint"):
        answer_probabilities(model, tokenizer, [prompt], [[longer, begin]], ends_turn=False)


def test_missing_base_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing.*organisms base"):
        load_base(tmp_path)


def test_shipped_taboo_behaves():
    report = measure("taboo")
    assert report.base.main <= 0.2
    assert report.finetuned.main >= 0.8
    for number in ("p_says_secret_when_guessed", "p_says_secret_when_asked"):
        assert getattr(report.base, number) >= 0.8
        assert getattr(report.finetuned, number) <= 0.1
    assert report.base.other_facts.accuracy >= 0.95
    assert report.finetuned.other_facts.accuracy >= 0.9


def test_shipped_false_fact_behaves():
    report = measure("false-fact")
    assert report.base.main <= 0.2
    assert report.finetuned.main >= 0.8
    assert report.base.p_true_answer >= 0.8
    assert report.finetuned.p_true_answer <= 0.2
    assert report.base.other_facts.accuracy >= 0.95
    assert report.finetuned.other_facts.accuracy >= 0.9
    assert report.finetuned.related_facts.accuracy >= 0.9


def test_shipped_files_are_small_and_name_no_path():
    folder = pretrained_models()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 5_000_000
    assert {path.parent.name for path in files} == {"world-base", *load_suite()}
    for path in files:
        assert path.suffix in {".md", ".json", ".jinja", ".safetensors"}
    for entry in load_suite().values():
        config = json.loads((entry.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == "tl_crosscoder/world-base"
        with safe_open(entry.adapter / "adapter_model.safetensors", framework="pt") as weights:
            layers = {name.split(".layers.")[1][0] for name in weights.keys()}  # noqa: SIM118
        assert layers == {"0", "1", "2", "3"}
