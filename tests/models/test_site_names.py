"""Which sites the fields of a config name, and whole runs of them from the command line."""

import json

import pytest
from models.tiny_pairs import CORPUS, HOOK

from tl_crosscoder import Crosscoder, ModelPair, RunConfig
from tl_crosscoder.cli.main import main
from tl_crosscoder.models.site import sites_of

LOW = "blocks.0.hook_resid_post"
RUN = {"base": "b", "hook_name": HOOK, "text": "t", "output": "o"}


def places(**fields) -> list[tuple]:
    sites = sites_of(RunConfig(**RUN | fields))
    return [(s.name, s.adapter or s.model_name, s.hook_name, s.revision) for s in sites]


def test_a_pair_is_named_as_before():
    assert places(finetuned="f", revision="r0", finetuned_revision="r1") == [
        ("base", "b", HOOK, "r0"),
        ("finetuned", "f", HOOK, "r1"),
    ]
    adapted = places(adapter="lora", revision="r0")
    assert adapted == [("base", "b", HOOK, "r0"), ("finetuned", "lora", HOOK, None)]


def test_several_finetuned_models_follow_the_base():
    assert places(finetuned="sft, rl", finetuned_revision="main,") == [
        ("base", "b", HOOK, None),
        ("finetuned", "sft", HOOK, "main"),
        ("finetuned_2", "rl", HOOK, None),
    ]
    assert [p[1] for p in places(adapter="one,two")] == ["b", "one", "two"]


def test_a_block_may_be_called_by_its_module_in_transformers():
    run = RunConfig(**RUN | {"hook_name": "model.layers.0, transformer.h.3"})
    assert run.hook_name == "blocks.0.hook_resid_post,blocks.3.hook_resid_post"
    assert {p[2] for p in places(hook_name="model.layers.7", finetuned="f")} == {
        "blocks.7.hook_resid_post"
    }
    names = {"adapter": "tl_crosscoder/taboo", "hook_name": "model.layers.1"}
    pair = ModelPair.from_pretrained("tl_crosscoder/world-base", **names)
    assert {site.hook_name for site in pair.sites} == {"blocks.1.hook_resid_post"}
    within = RunConfig(**RUN | {"hook_name": "model.layers.0.mlp"})
    assert within.hook_name == "model.layers.0.mlp"


def test_several_hook_points_are_read_in_every_model():
    both = f"{LOW},{HOOK}"
    assert places(hook_name=both) == [
        (f"base@{LOW}", "b", LOW, None),
        (f"base@{HOOK}", "b", HOOK, None),
    ]
    assert [p[1:3] for p in places(hook_name=both, finetuned="f")] == [
        ("b", LOW),
        ("b", HOOK),
        ("f", LOW),
        ("f", HOOK),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"give exactly one of finetuned \(None\) and adapter \(None\)"),
        ({"finetuned": "f", "adapter": "a"}, "give exactly one of finetuned"),
        ({"hook_name": f"{HOOK},{HOOK}", "finetuned": "f"}, "hook points that differ"),
        ({"hook_name": f"{HOOK},", "finetuned": "f"}, "has an empty name between its commas"),
        ({"finetuned": "sft,,rl"}, "finetuned .*'sft,,rl' has an empty name"),
        ({"finetuned": "sft,rl", "finetuned_revision": "v1"}, r"\['v1'\] is not one for each of"),
        ({"finetuned": "sft,rl", "difference": True}, "a difference is between two sites"),
        ({"finetuned": "f", "hook_name": "a,b", "difference": True}, "between two sites"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sites_of(RunConfig(**RUN | fields))


FLAGS = {
    "d-sae": 64, "n-tokens": 1280, "batch-size": 128, "context-size": 16, "lr": 0.005,
    "lr-warmup-steps": 5, "buffer-contexts": 60,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    words = " ".join(CORPUS).split()
    documents = [{"text": " ".join(words[i % 40 : i % 40 + 20 + i % 7])} for i in range(160)]
    path = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in documents))
    return str(path)


@pytest.mark.parametrize(
    ("finetuned", "flags", "n_sites"),
    [(["sft", "rl"], [], 3), (["sft"], ["--difference"], 1)],
    ids=["three", "difference"],
)
def test_train_and_analyze_any_sites(
    site_folders, text, tmp_path, capsys, finetuned, flags, n_sites
):
    output = tmp_path / "run"
    named = {"base": site_folders["base"], "hook-name": HOOK, "text": text, "output": output}
    named["finetuned"] = ",".join(str(site_folders[n]) for n in finetuned)
    pairs = [(f"--{k}", str(v)) for k, v in (named | FLAGS).items()]
    assert main(["train", *(x for pair in pairs for x in pair), *flags]) == 0
    printed = capsys.readouterr().out
    assert Crosscoder.load(output).n_sites == n_sites
    assert (output / "relative_decoder_norm.html").exists() == (n_sites > 1)
    assert main(["analyze", str(output), "--fresh"]) == 0
    fresh = capsys.readouterr().out
    assert fresh.strip() in printed
    assert main(["analyze", str(output)]) == 0
    assert capsys.readouterr().out == fresh
