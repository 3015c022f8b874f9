"""Small random pairs of both kinds of model, with a random dictionary, for interventions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models.random_models import random_crosscoder
from models.tiny_pairs import CORPUS, HOOK, SIZES, hooked_transformer, save_model, save_tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tl_crosscoder import Crosscoder, ModelPair, TokenizedText, tokenize
from tl_crosscoder.models.source import ActivationSource

MakeCrosscoder = Callable[..., Crosscoder]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    root = tmp_path_factory.mktemp("interventions")
    found = {}
    for family in ("llama", "gemma2"):
        one, other = (save_model(root / f"{family}-{i}", family, seed=i) for i in (0, 1))
        found[family] = one, other
    return found


@pytest.fixture(scope="session")
def pairs(folders: dict[str, tuple[Path, Path]]) -> dict[str, ModelPair]:
    """Shared: a test leaves them as they were."""
    made = {
        family: ModelPair.from_pretrained(*folder, hook_name=HOOK)
        for family, folder in folders.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(folders["llama"][0])
    for name, seeds in {"hooked": (1, 2), "equal": (1, 1)}.items():
        both = [hooked_transformer(tokenizer, seed) for seed in seeds]
        made[name] = ModelPair(
            *both, hook_name=HOOK, model_names=("random", f"random fine-tuned {seeds}")
        )
    return made


@pytest.fixture(params=["hooked", "llama"])
def pair(request: pytest.FixtureRequest, pairs: dict[str, ModelPair]) -> ModelPair:
    return pairs[request.param]


@pytest.fixture(scope="session")
def make_crosscoder() -> MakeCrosscoder:
    """A random dictionary of 12 latents for a source, of which latent 3 never fires."""

    def make(source: ActivationSource, **changes) -> Crosscoder:
        made = random_crosscoder(source.sites, 12, scale=0.4, **changes)
        made.b_enc.data[3] = -1e6
        return made

    return make


@pytest.fixture
def crosscoder(pair: ModelPair, make_crosscoder: MakeCrosscoder) -> Crosscoder:
    return make_crosscoder(pair)


@pytest.fixture(scope="session")
def words(pairs: dict[str, ModelPair]) -> tuple[TokenizedText, TokenizedText]:
    """(training, held-out) contexts of 16 tokens."""
    each = " ".join(CORPUS).split()
    documents = [{"text": " ".join(each[i % 40 : i % 40 + 20 + i % 7])} for i in range(60)]
    tokenizer = pairs["llama"].tokenizer
    training, held_out = (
        tokenize(part, tokenizer, context_size=16) for part in (documents[:45], documents[45:])
    )
    return training, held_out


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bridge's model whose layers are stored inputs first, and have biases."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 3, "n_positions": 64}
    ids = {name: SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **ids, initializer_range=0.3))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return folder
