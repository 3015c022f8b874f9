"""LoRA adapters trained on texts, on models of two families."""

import math
from dataclasses import replace

import pytest
import torch
from models.tiny_pairs import HOOK, save_adapter
from transformers import AutoModelForCausalLM

from tl_crosscoder import ModelPair, Site
from tl_crosscoder.config.null import LoraTraining
from tl_crosscoder.models.loading import load_trainable
from tl_crosscoder.models.lora import (
    LoraTrained,
    TrainingText,
    cross_entropy,
    lora_config,
    train_lora,
    weights_moved,
)

TEXTS = [
    TrainingText(ids=tuple((7 * i + j * j) % 250 + 3 for j in range(6 + i % 3)), n_prompt=i % 4)
    for i in range(20)
]
HOW = LoraTraining(n_steps=2, batch_size=5, lr=0.02, rank=4)


def site_of(folder, **changes) -> Site:
    return Site(name="base", hook_name=HOOK, model_name=str(folder), **changes)


@pytest.fixture(scope="module")
def base(folders):
    return folders["llama"][0]


def trained(folder, output, how=HOW, **like):
    model = load_trainable(site_of(folder), device="cpu", dtype="float32")
    lora = lora_config(like.get("like"), rank=how.rank)
    return train_lora(model, TEXTS, output, lora=lora, how=how, base_name=str(folder))


def test_cross_entropy_is_of_what_follows_the_prompts(base):
    """Text by text and token by token; the first token of a text follows nothing."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    naive = []
    for text in TEXTS:
        log_probs = model(torch.tensor([text.ids])).logits[0].detach().double().log_softmax(-1)
        naive += [-log_probs[i - 1, text.ids[i]].item()
                  for i in range(max(1, text.n_prompt), len(text.ids))]  # fmt: skip
    assert cross_entropy(model, TEXTS, batch_size=7) == pytest.approx(sum(naive) / len(naive))


def test_what_is_saved_is_what_was_trained_and_the_same_again(base, tmp_path):
    """Loaded as any adapter is; the base is as it was."""
    expected = torch.random.get_rng_state()
    found = trained(base, tmp_path / "one")
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert found == LoraTrained.load(tmp_path / "one") == trained(base, tmp_path / "same")
    pair = ModelPair.from_pretrained(base, adapter=tmp_path / "one", hook_name=HOOK)
    held_out = TEXTS[: len(TEXTS) - found.n_texts]
    assert len(held_out) == 2
    for model, ce in zip(pair.models, (found.ce_before, found.ce_after), strict=True):
        losses = []
        for text in held_out:
            log_probs = model(torch.tensor([text.ids]))[0].detach().double().log_softmax(-1)
            losses += [-log_probs[i - 1, text.ids[i]].item()
                       for i in range(max(1, text.n_prompt), len(text.ids))]  # fmt: skip
        assert ce == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert 1e-4 < weights_moved(*pair.models) < 1
    assert weights_moved(pair.models[0], pair.models[0]) == 0


def test_weights_move_by_what_the_adapter_adds(base, tmp_path):
    adapter = save_adapter(tmp_path / "random", base)
    merged, attached = (
        ModelPair.from_pretrained(base, adapter=adapter, hook_name=HOOK, merge_adapter=merge)
        for merge in (True, False)
    )
    plain, tuned = (dict(m.named_parameters()) for m in merged.models)
    before = torch.cat([weight.flatten() for weight in plain.values()])
    after = torch.cat([tuned[name].flatten() for name in plain])
    expected = ((after - before).norm() / before.norm()).item()
    assert weights_moved(*merged.models) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(weights_moved(*attached.models))


def test_rank_and_layers_are_those_of_an_adapter_or_all_of_a_rank(base, tmp_path):
    like = str(save_adapter(tmp_path / "like", base, r=3))
    assert trained(base, tmp_path / "new", like=like).rank == 3
    config = lora_config(like, rank=4)
    assert (config.r, {*config.target_modules}) == (3, {"q_proj", "up_proj"})
    plain = lora_config(None, rank=4)
    assert (plain.r, plain.target_modules) == (4, "all-linear")


def test_what_cannot_be_trained_is_refused(base, tmp_path):
    model = load_trainable(site_of(base), device="cpu", dtype="float32")
    how = {"how": HOW, "base_name": "base"}
    with pytest.raises(ValueError, match="there are 1 texts to train an adapter on"):
        train_lora(model, TEXTS[:1], tmp_path / "few", lora=lora_config(None, rank=2), **how)
    odd = replace(lora_config(None, rank=2), target_modules={"nowhere"})
    with pytest.raises(ValueError, match="no LoRA adapter of rank 2 can be put on this Llama"):
        train_lora(model, TEXTS, tmp_path / "odd", lora=odd, **how)
    with pytest.raises(FloatingPointError, match="Take a smaller learning rate than 1e"):
        trained(base, tmp_path / "far", replace(HOW, lr=1e30))
    with pytest.raises(ValueError, match=r"4 bits \(nf4\), in which no adapter is trained"):
        load_trainable(site_of(base), device="cpu", dtype="nf4")
    assert not any(tmp_path.iterdir())
