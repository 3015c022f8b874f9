import pytest
import torch
from models.tiny_pairs import HOOK, TEXTS

from tl_crosscoder.models.devices import devices_of, first_device, moved_together
from tl_crosscoder.models.pair import ModelPair, planned_sites


def test_one_device_is_for_all_and_several_are_one_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices_of("cpu", 3) == ["cpu"] * 3
    assert devices_of("cuda", 2) == ["cuda", "cuda"]
    assert devices_of("cuda:1, cuda:0", 2) == ["cuda:1", "cuda:0"]
    assert devices_of("cuda:0,cuda:1,cuda:0", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert first_device("cuda:1, cuda:0") == "cuda:1"
    assert first_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:0,cuda:1", r"'cuda:0,cuda:1' names 2 devices for 3 models: give one for all"),
        ("cuda:0,cuda:1,cuda:2", r"'cuda:2' is not there: .* sees 2 CUDA devices"),
        ("cpu,cuda:0,cpu", r"of the kinds \['cpu', 'cuda'\].*Choose one kind"),
        ("gpu", r"device 'gpu' is not one: use 'cpu'"),
        ("cpu,,cpu", r"device '' is not one"),
    ],
)
def test_what_cannot_be_is_refused_with_both_numbers(monkeypatch, device, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=message):
        devices_of(device, 3)


def test_a_pair_and_any_sites_take_one_for_each_model(folders, pairs):
    base, finetuned = folders["llama"]
    pair = ModelPair.from_pretrained(base, finetuned, hook_name=HOOK, device="cpu,cpu")
    tokens = pair.to_tokens(TEXTS)
    assert torch.equal(pair.activations(tokens), pairs["llama"].activations(tokens))
    with pytest.raises(ValueError, match="3 devices for 2 models"):
        ModelPair.from_pretrained(base, finetuned, hook_name=HOOK, device="cpu,cpu,cpu")
    # Two sites of one model are one model.
    hooks = ["blocks.0.hook_resid_post", HOOK]
    sites = planned_sites([base, finetuned], hooks)
    assert ModelPair.from_sites(sites, device="cpu,cpu").n_sites == 4
    with pytest.raises(ValueError, match="4 devices for 2 models"):
        ModelPair.from_sites(sites, device="cpu,cpu,cpu,cpu")


def test_all_sites_of_a_model_move_at_once():
    parts = [torch.randn(2, 3, 4), torch.randn(2, 3, 5)]
    here = moved_together(parts, torch.device("cpu"), torch.float64)
    assert all(torch.equal(p, q.double()) for p, q in zip(here, parts, strict=True))
    there = moved_together(parts, torch.device("meta"), torch.bfloat16)
    assert [(p.shape, p.device.type, p.dtype) for p in there] == [
        (q.shape, "meta", torch.bfloat16) for q in parts
    ]
