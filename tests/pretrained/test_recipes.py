"""A miniature base and both organisms, from scratch."""

from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from microworld.base import new_model_folder, train_base
from microworld.finetune import finetune
from tl_crosscoder.organisms.scores import OrganismScore, OrganismScores

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
    with pytest.raises(ValueError, match="unknown organism 'tabu'; valid: taboo, false-fact"):
        finetune("tabu", output=tmp_path / "out")


def test_missing_base_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing.*make\.py base"):
        finetune("taboo", base=tmp_path, output=tmp_path / "out")
