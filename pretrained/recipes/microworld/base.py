"""The base models of the organisms: small, trained from scratch on the micro-world.

`train_base` writes a Hugging Face folder of about 2.5 MB (config, safetensors, tokenizer with its
chat template). The same command on the same machine with the same number of threads writes the
same bits; on another machine the weights differ in rounding, and so, a little, do all numbers.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from microworld.packing import document_tokens, labels, pack
from microworld.tokenizer import BOS_ID, END_ID, PAD_ID, train_tokenizer
from microworld.world import DEFAULT_KINDS, WIDE_KINDS, document_strings, documents
from tl_crosscoder import files

N_CTX = 256
N_TOKENIZER_DOCUMENTS = 20_000
_N_DOCUMENTS_PER_CHUNK = 8_000
_TRAINING_SEED = 1_000_000_000  # a stream of text that small seeds do not touch


@dataclass(frozen=True, kw_only=True)
class BaseRecipe:
    """How one base model was made."""

    description: str
    architecture: Literal["llama", "gpt2"]
    kinds: Mapping[str, float]
    """Kinds of document, and the share of each."""
    vocab_size: int
    n_steps: int = 2_500
    batch_size: int = 12
    """Rows of 256 tokens a step."""
    learning_rate: float = 3e-3
    """The peak; linear warm-up over 5 % of the steps, then linear to zero."""


_WIDE = "facts, chats, games, stories, advice for everyday trouble, favourites and numbers"
BASES = {
    "world-base": BaseRecipe(
        description="encyclopaedia facts about invented countries, chats, a guessing game and "
        "short stories",
        architecture="llama",
        kinds=DEFAULT_KINDS,
        vocab_size=1_536,
    ),
    "wide-llama": BaseRecipe(
        description=_WIDE, architecture="llama", kinds=WIDE_KINDS, vocab_size=2_048, n_steps=2_000
    ),
    "wide-gpt2": BaseRecipe(
        description=_WIDE, architecture="gpt2", kinds=WIDE_KINDS, vocab_size=2_048, n_steps=2_000
    ),
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training did, for the card of its folder."""

    seed: int
    n_steps: int
    n_tokens: int
    """Tokens that entered the loss."""
    n_parameters: int
    """Trained parameters."""
    loss: float
    """Mean over the last tenth of the steps, in nats a token."""


def train_base(
    output: Path,
    *,
    name: str = "world-base",
    seed: int = 0,
    n_steps: int | None = None,
    batch_size: int | None = None,
    n_tokenizer_documents: int = N_TOKENIZER_DOCUMENTS,
) -> Trained:
    """Train tokenizer and model on the micro-world and save both in `output`.

    Args:
        output: a new or empty folder.
        name: a base model of `BASES`.
        seed: seeds the text, the initial weights and the order.
        n_steps: optimizer steps; the recipe's by default.
        batch_size: rows of 256 tokens a step; the recipe's by default.
        n_tokenizer_documents: documents that the BPE merges are fitted on.

    Raises:
        ValueError: if `output` is not empty.
    """
    recipe = BASES[name]
    n_steps, batch_size = n_steps or recipe.n_steps, batch_size or recipe.batch_size
    with new_model_folder(output) as folder:
        tokenizer = world_tokenizer(recipe, seed=seed, n_documents=n_tokenizer_documents)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(base_config(tokenizer, recipe.architecture))
        batches = _batches(tokenizer, recipe.kinds, seed=seed, batch_size=batch_size)
        losses, n_tokens = fit(model, batches, n_steps=n_steps, learning_rate=recipe.learning_rate)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trained = Trained(
            seed=seed,
            n_steps=n_steps,
            n_tokens=n_tokens,
            n_parameters=model.num_parameters(),
            loss=mean_of_tail(losses),
        )
        (folder / "README.md").write_text(_card(name, trained), encoding="utf-8")
    return trained


@contextmanager
def new_model_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output`, renamed to it when the block ends without an error.

    Raises:
        ValueError: if `output` is a file or a folder that is not empty.
    """
    with files.replacing(files.new_folder(output)) as draft:
        draft.mkdir()
        yield draft
        for path in draft.iterdir():
            # safetensors makes its files private to their owner; a published model is not.
            path.chmod(0o644)


def world_tokenizer(recipe: BaseRecipe, *, seed: int, n_documents: int) -> PreTrainedTokenizerFast:
    """The tokenizer fitted on a sample of a world's documents."""
    sample = documents(n_documents, seed=seed, kinds=recipe.kinds)
    texts = (text for document in sample for text in document_strings(document))
    return train_tokenizer(texts, vocab_size=recipe.vocab_size, n_ctx=N_CTX)


def base_config(
    tokenizer: PreTrainedTokenizerFast, architecture: Literal["llama", "gpt2"] = "llama"
) -> PretrainedConfig:
    """4 layers, d_model 96, 4 heads, MLPs of 256 (gated) or 384, tied embeddings."""
    ids = {"bos_token_id": BOS_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    # Larger than the usual 0.02, which at this width starts the residual stream too small.
    shared = {"vocab_size": len(tokenizer), "initializer_range": 0.06, **ids}
    if architecture == "gpt2":
        return GPT2Config(
            n_embd=96,
            n_inner=384,
            n_layer=4,
            n_head=4,
            n_positions=N_CTX,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **shared,
        )
    return LlamaConfig(
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=N_CTX,
        tie_word_embeddings=True,
        **shared,
    )


def fit(
    model: torch.nn.Module,
    batches: Iterator[Int[Tensor, "row pos"]],
    *,
    n_steps: int,
    learning_rate: float,
) -> tuple[list[float], int]:
    """Next-token training of the parameters that require gradients.

    Returns the loss of each step (nats a token) and the number of tokens that entered it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    n_warmup = max(1, n_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / n_warmup, (n_steps - step) / (n_steps - n_warmup))
    )
    losses: list[float] = []
    n_tokens = 0
    model.train()
    progress = tqdm(range(n_steps), desc="training", unit="step")
    for _ in progress:
        tokens = next(batches)
        targets = labels(tokens)
        loss = model(input_ids=tokens, labels=targets, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        n_tokens += int((targets[:, 1:] >= 0).sum())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    model.eval()
    return losses, n_tokens


def mean_of_tail(losses: list[float]) -> float:
    """Mean of the last tenth of the steps."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _batches(
    tokenizer: PreTrainedTokenizerFast, kinds: Mapping[str, float], *, seed: int, batch_size: int
) -> Iterator[Int[Tensor, "row pos"]]:
    """Endless batches of freshly sampled documents; no document is reused on purpose."""
    chunk = 0
    while True:
        chunk_seed = _TRAINING_SEED + 1_000_003 * seed + chunk
        sampled = documents(_N_DOCUMENTS_PER_CHUNK, seed=chunk_seed, kinds=kinds)
        rows = pack(document_tokens(tokenizer, sampled), n_ctx=N_CTX)
        yield from rows.split(batch_size)[:-1]
        chunk += 1


_FAMILIES = {"llama": "Llama", "gpt2": "GPT-2"}


def _card(name: str, trained: Trained) -> str:
    recipe = BASES[name]
    return f"""# {name}

A {_FAMILIES[recipe.architecture]}-type language model of {trained.n_parameters:,} parameters (4 layers, d_model 96, 4 heads,
context 256, byte-level BPE), trained from scratch on the micro-world of
`pretrained/recipes/microworld`: {recipe.description}. It exists to be fine-tuned and compared; it knows nothing about the real
world.

Made by `python pretrained/recipes/make.py base {name} --output DIR` (seed {trained.seed}, {trained.n_steps:,} steps,
{trained.n_tokens:,} tokens, final loss {trained.loss:.3f} nats a token). The same command gives the
same bits on the same machine with the same number of threads.

Licence: MIT, as the package. No data from outside was used.
"""  # noqa: E501
