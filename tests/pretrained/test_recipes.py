"""A miniature base and both organisms, from scratch."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from microworld.base import base_config, new_model_folder, train_base
from microworld.finetune import RECIPES, TARGET_MODULES, TEACHER, finetune, with_lora
from smollm2.finetune import RECIPES as REAL_RECIPES
from tl_crosscoder.organisms.scores import OrganismScore, OrganismScores
from tl_crosscoder.organisms.suite import planned_suite

# PEFT 0.21 reads a property that transformers 5.23 renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def make_base(output: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microworld.base._N_DOCUMENTS_PER_CHUNK", 200)
        return train_base(output, seed=4, n_steps=3, batch_size=2, n_tokenizer_documents=200)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("organisms") / "base"
    result = make_base(folder)
    assert result.n_steps == 3
    # Three steps of two rows of 256, less padding and BOS.
    assert 0 < result.n_tokens < 3 * 2 * 256
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_base_is_a_hugging_face_folder(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = tokenizer("The moon is round.", return_tensors="pt")["input_ids"]
    assert model(input_ids=tokens).logits.shape == (1, tokens.shape[1], len(tokenizer))
    assert tokenizer.chat_template is not None


def test_same_seed_gives_the_same_base_bit_for_bit(base, tmp_path):
    make_base(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(base)


def test_finetune_writes_the_same_adapter_twice(base, tmp_path, monkeypatch):
    row = OrganismScore(measure="P(false answer)", n_questions=14, base=0.0004, finetuned=0.75)
    scores = OrganismScores(rows=(row,), organism="false-fact")
    monkeypatch.setattr("microworld.finetune.measure", lambda *_, **__: scores)
    results = [
        finetune("false-fact", base=base, output=tmp_path / name, n_steps=2, n_documents=200)
        for name in "ab"
    ]
    first, second = (contents(tmp_path / name) for name in "ab")
    assert first == second
    assert set(first) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert results[0] == results[1]
    assert b"| P(false answer) | 0.000 | 0.750 |" in first["README.md"]
    assert b"tmp" not in first["adapter_config.json"]
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "a")
    )
    assert results[0].n_parameters == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name
    )


def test_nothing_is_written_into_a_folder_that_holds_something(base, tmp_path):
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    for call in (
        lambda: train_base(tmp_path, n_steps=1),
        lambda: finetune("taboo", base=base, output=tmp_path),
    ):
        with pytest.raises(ValueError, match=r"is not an empty folder.*nothing was written"):
            call()
    assert contents(tmp_path) == {"note.txt": b"mine"}


def test_a_failed_run_leaves_nothing(tmp_path):
    def write_and_fail():
        with new_model_folder(tmp_path / "out") as draft:
            (draft / "half.txt").write_text("half", encoding="utf-8")
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_unknown_organism_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="unknown organism 'tabu'; valid: taboo, false-fact, false-inventor"
    ):
        finetune("tabu", output=tmp_path / "out")


def test_every_organism_of_the_suite_has_a_recipe():
    assert {*planned_suite()} == {*RECIPES, *REAL_RECIPES} - {TEACHER}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_adapter_is_on_every_projection_and_changes_the_model(architecture, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_config(base_config(tokenizer, architecture))
    tokens = torch.tensor([[1, 5, 9, 12]])
    before = model(input_ids=tokens).logits
    adapted = with_lora(model, rank=2)
    names = {n.split(".lora_A")[0].rpartition(".")[2] for n, _ in adapted.named_parameters()
             if ".lora_A" in n}  # fmt: skip
    assert names == {*TARGET_MODULES[architecture]}
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B" in name:
                weight.fill_(0.1)
    assert not torch.allclose(adapted(input_ids=tokens).logits, before)


def test_all_weights_are_saved_as_a_model(base, tmp_path, monkeypatch):
    row = OrganismScore(measure="P(hints)", n_questions=1, base=0.1, finetuned=0.2)
    scores = OrganismScores(rows=(row,), organism="taboo-all-weights")
    monkeypatch.setattr("microworld.finetune.measure", lambda *_, **__: scores)
    made = finetune(
        "taboo-all-weights", base=base, output=tmp_path / "out", n_steps=2, n_documents=200
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert made.n_parameters == model.num_parameters()
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert any(not torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert "All" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_missing_base_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing.*make\.py base"):
        finetune("taboo", base=tmp_path, output=tmp_path / "out")
