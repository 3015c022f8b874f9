"""One door to training: the notebook and the command line make the same dictionary."""

import json
import re
from dataclasses import replace

import pytest
import torch
from models.tiny_pairs import CORPUS, HOOK, save_model
from safetensors.torch import load_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tl_crosscoder import ModelPair, RunConfig, diff, load_documents, preset, scan, tokenize
from tl_crosscoder.cli.main import main
from tl_crosscoder.config.causal import EffectQuestion
from tl_crosscoder.data.documents import content_hash
from tl_crosscoder.interventions.layer_scan_result import LayerScan
from tl_crosscoder.run.causal import effects
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

PAIR = {
    "base": "tl_crosscoder/world-base",
    "adapter": "tl_crosscoder/taboo",
    "hook_name": "blocks.1.hook_resid_post",
}
TEXT = {"text": "tl_crosscoder/taboo", "max_documents": 120, "n_tokens": 1500}
IDS = [{"input_ids": [(7 * i + j) % 40 for j in range(12)]} for i in range(80)]
CFG = {"n_layers": 2, "d_model": 8, "n_ctx": 16, "d_head": 4, "d_vocab": 40, "act_fn": "relu"}


def test_diff_and_train_give_the_same_bits_and_record_what_was_chosen(tmp_path, capsys):
    """Same arguments, nothing about sizes but the tokens: weights and settings are equal."""
    given = PAIR | TEXT
    flags = [x for k, v in given.items() for x in ("--" + k.replace("_", "-"), str(v))]
    assert (
        main(
            [
                "train",
                *flags,
                "--no-changes",
                "--output",
                str(tmp_path / "cli"),
                "delta",
                "--k",
                "4",
            ]
        )
        == 0
    )
    assert "activation pairs in batches of 64" in " ".join(capsys.readouterr().err.split())
    found = diff(
        given["base"],
        **{k: v for k, v in given.items() if k != "base"},
        preset="delta",
        k=4,
        output=tmp_path / "notebook",
        changes=False,
    )
    cli, notebook = (
        load_file(tmp_path / name / "sae_weights.safetensors") for name in ("cli", "notebook")
    )
    assert cli.keys() == notebook.keys()
    assert all(torch.equal(cli[name], notebook[name]) for name in cli)
    made = [
        json.loads((tmp_path / name / "runner_cfg.json").read_text())["training"] | {"output": ""}
        for name in ("cli", "notebook")
    ]
    assert made[0] == made[1]
    assert (made[0]["batch_size"], made[0]["d_sae"], made[0]["lr_warmup_steps"]) == (64, 16, 2)
    assert made[0]["preset"]["name"] == "delta"
    assert found.crosscoder.cfg.d_sae == 16


def test_a_name_of_a_text_belongs_in_the_config(tmp_path):
    config = RunConfig(**PAIR, output=str(tmp_path / "run"), preset=preset("batchtopk", k=4))
    with pytest.raises(ValueError, match="belongs in the config's text"):
        train(config, text="tl_crosscoder/taboo")
    with pytest.raises(ValueError, match="no text was given"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_a_run_whose_models_have_no_tokenizer_opens_again_with_the_one_it_named(tmp_path):
    names = [
        save_model(tmp_path / name, seed=i, has_tokenizer=name == "named")
        for i, name in enumerate(("base", "finetuned", "named"))
    ]
    base, finetuned, named = map(str, names)
    config = RunConfig(
        base=base, finetuned=finetuned, tokenizer=named, hook_name=HOOK, context_size=16,
        n_tokens=640, d_sae=16, output=str(tmp_path / "run"), preset=preset("batchtopk", k=2),
    )  # fmt: skip
    documents = [{"text": f"{text} {i}"} for i in range(10) for text in CORPUS]
    run = train(config, text=documents)
    again = Run(path=run.path)
    assert again.record["tokenizer"] == again.models.tokenizer_name == named
    assert again.models.encode(CORPUS[0]) == run.models.encode(CORPUS[0])


def test_a_run_without_a_hook_point_scans_the_layers_once(tmp_path, capsys):
    """The dictionary is what it would be at the hook point that it recommends."""
    base, finetuned = (str(save_model(tmp_path / name, seed=i)) for i, name in enumerate("ab"))
    documents = [{"text": f"{text} {i}"} for i in range(10) for text in CORPUS]
    config = RunConfig(
        base=base, finetuned=finetuned, context_size=16, n_tokens=640, d_sae=16,
        output=str(tmp_path / "one"), preset=preset("batchtopk", k=2),
    )  # fmt: skip
    chosen = train(config, text=documents)
    said = " ".join(capsys.readouterr().err.split())
    found = LayerScan.load(tmp_path / "one" / "layer_scan.json")
    hook = found.hook_name
    assert f"{' '.join(found.line().split())} {base} and {finetuned} at {hook}; " in said
    assert chosen.record["training"]["hook_name"] == chosen.crosscoder.sites[1].hook_name == hook
    assert found.text["part"] == "training documents"
    named = replace(config, hook_name=hook, output=str(tmp_path / "named"))
    assert torch.equal(train(named, text=documents).crosscoder.W_dec, chosen.crosscoder.W_dec)
    assert not (tmp_path / "named" / "layer_scan.json").exists()
    capsys.readouterr()
    assert train(config, text=documents, resume=True).record == chosen.record
    assert "Hook at" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="k is 20, but the dictionary has only 16"):
        train(replace(config, output=str(tmp_path / "no"), preset=preset("batchtopk", k=20)),
              text=documents)  # fmt: skip
    assert "Hook at" not in capsys.readouterr().err


def test_one_token_contexts_are_left_out_and_the_rest_is_scanned():
    models = [HookedTransformer(HookedTransformerConfig(**CFG, seed=i)) for i in range(2)]
    texts = [{"input_ids": [i]} for i in range(20)] + IDS
    found = scan(*models, text=texts, n_prompts=12)
    assert found.text["n_contexts"] == 12
    assert found.models == ("custom", "custom")
    contexts = tokenize(IDS, ModelPair(*models, hook_name=HOOK, model_names=["a", "b"]).tokenizer,
                        context_size=12)  # fmt: skip
    assert scan(*models, text=contexts, n_prompts=12).text["n_predicted"] == 12 * 11
    with pytest.raises(
        ValueError, match="none of 18 documents has a token to predict: each is one"
    ):
        scan(*models, text=texts[:20])
    with pytest.raises(ValueError, match=r"scan has unknown fields \['d_sae'\]"):
        scan(*models, text=IDS, d_sae=3)
    with pytest.raises(ValueError, match="the models are loaded already, so dtype"):
        scan(*models, text=IDS, dtype="bfloat16")


def test_prompts_of_causal_tests_are_no_documents_of_the_training(taboo_pair, tmp_path, capsys):
    """Every document is there twice, as many are in real texts."""
    documents = load_documents("tl_crosscoder/taboo", max_documents=40) * 2
    config = RunConfig(
        base="b", hook_name=HOOK, n_tokens=320, d_sae=16, held_out=0.2,
        output=str(tmp_path / "run"), preset=preset("batchtopk", k=2),
    )  # fmt: skip
    run = train(config, models=taboo_pair, text=documents)
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(r"4\d of 80 documents are repeated", said)
    held_out = {content_hash(d) for d in run.documents()}
    training = run.prompts([d for d in documents if content_hash(d) not in held_out])
    prompts = effects(run, EffectQuestion())[0].text
    assert len(prompts) > 2
    assert not {tuple(row) for row in prompts.tokens.tolist()} & {
        tuple(row) for row in training.tokens.tolist()
    }


def test_models_without_any_tokenizer_learn_from_ids_and_open_again(tmp_path):
    names = [str(save_model(tmp_path / n, seed=i, has_tokenizer=False)) for i, n in enumerate("ab")]
    config = RunConfig(
        base=names[0], finetuned=names[1], hook_name=HOOK, context_size=12, n_tokens=320, d_sae=16,
        output=str(tmp_path / "run"), preset=preset("batchtopk", k=2),
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no other model here has one: text is to be given as inp"):
        run = train(config, text=IDS)
    assert run.measurement().top[0].examples[0].token.strip().isdigit()
    with pytest.warns(UserWarning, match="text is to be given as input_ids"):
        _, text = Run(path=run.path).measured()
    assert torch.equal(text.tokens, run.measured()[1].tokens)
    with pytest.raises(ValueError, match="no tokenizer, so that the text 'The cat'"):
        run.models.encode("The cat")


def test_a_run_of_models_in_memory_says_that_it_needs_them(tmp_path):
    """Vocabularies of one's own, and names that no hub has."""
    models = [HookedTransformer(HookedTransformerConfig(**CFG, seed=i)) for i in range(2)]
    pair = ModelPair(*models, hook_name="blocks.1.hook_resid_post", model_names=["./mine", "./ft"])
    config = RunConfig(
        output=str(tmp_path / "run"), n_tokens=320, d_sae=16, context_size=12, dead_after_tokens=99,
        preset=preset("batchtopk", k=2),
    )  # fmt: skip
    run = train(config, models=pair, text=IDS)
    with pytest.raises(FileNotFoundError, match=r"'./mine' does not exist.* load_diff\(.*models="):
        _ = Run(path=run.path).models
    again = Run(path=run.path, loaded=pair)
    assert torch.equal(again.measured()[1].tokens, run.measured()[1].tokens)
