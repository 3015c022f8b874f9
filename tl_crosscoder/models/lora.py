"""A LoRA adapter, trained on texts of token ids and saved as a PEFT folder.

Contract: the loss is the cross-entropy, nats a token, of what follows each text's prompt; the base
keeps its weights, and the global random generator its state. The folder is what `with_adapter`
takes, and says in `training.json` how it was trained, and how well base and adapted model predict
texts that were not. Limit: the model is in float weights, on one device.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.config.null import LoraTraining
from tl_crosscoder.config.settings import from_mapping
from tl_crosscoder.models.loading import adapter_folder
from tl_crosscoder.progress import progress

TRAINING_NAME = "training.json"
HELD_OUT = 0.1
"""Share of the texts that cross-entropy is measured on, before and after."""
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """One text; the loss is of what follows its prompt."""

    ids: tuple[int, ...]
    n_prompt: int
    """Tokens of the prompt; the very first token of a text is never predicted."""


@dataclass(frozen=True, kw_only=True)
class LoraTrained:
    """What a training did."""

    n_steps: int
    lr: float
    rank: int
    n_texts: int
    """Texts that were trained on."""
    n_tokens: int
    """Tokens that entered the loss, each as often as it did."""
    ce_before: float
    """Cross-entropy of held-out texts in the base, nats a token."""
    ce_after: float
    """The same with the adapter."""

    @classmethod
    def load(cls, folder: Path) -> "LoraTrained":
        """Read what stands in an adapter's folder. Raises ValueError where it is damaged."""
        path = folder / TRAINING_NAME
        return from_mapping(cls, files.read_object(path), name=str(path))


def lora_config(adapter: str | None, revision: str | None = None, *, rank: int) -> Any:
    """LoRA on the layers and of the rank of an adapter; without a LoRA adapter on all of a rank.

    "All" are the linear layers of the blocks, as PEFT finds them, and alpha is twice the rank.
    """
    from peft import LoraConfig, PeftConfig

    plain = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    if adapter is None:
        return plain
    theirs = PeftConfig.from_pretrained(str(adapter_folder(adapter, revision)))
    if not isinstance(theirs, LoraConfig):
        return plain
    fresh: dict[str, Any] = dict.fromkeys(
        ("modules_to_save", "revision", "base_model_name_or_path")
    )
    return replace(theirs, lora_dropout=0.0, init_lora_weights=True, inference_mode=False, **fresh)


def train_lora(
    hf_model: Any,
    texts: Sequence[TrainingText],
    output: Path,
    *,
    lora: Any,
    how: LoraTraining,
    base_name: str,
    show_progress: bool = False,
) -> LoraTrained:
    """Train an adapter on texts, and save it in a folder, complete or not at all.

    Args:
        hf_model: a Hugging Face causal language model, whose modules PEFT wraps in place.
        texts: a tenth of them, at least one, is kept for cross-entropy.
        output: a folder that is not there yet.
        lora: a PEFT `LoraConfig`.
        how: steps, learning rate and seed.
        base_name: name of the base that the adapter records.
        show_progress: with a progress bar.

    Raises:
        ValueError: fewer than two texts, or layers that the model does not have.
        FloatingPointError: a loss that is not finite.
    """
    if len(texts) < 2:
        raise ValueError(
            f"there are {len(texts)} texts to train an adapter on, and two are the least: one to "
            "train on and one to measure. Give more text."
        )
    n_kept = max(1, round(HELD_OUT * len(texts)))
    devices = [hf_model.device] if hf_model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(how.seed)
        adapted = _adapted(hf_model, lora)
        before = cross_entropy(adapted, texts[:n_kept])
        n_tokens = _fit(adapted, texts[n_kept:], how, show_progress=show_progress)
    trained = LoraTrained(
        n_steps=how.n_steps,
        lr=how.lr,
        rank=lora.r,
        n_texts=len(texts) - n_kept,
        n_tokens=n_tokens,
        ce_before=before,
        ce_after=cross_entropy(adapted, texts[:n_kept]),
    )
    _save(adapted, output, trained, base_name=base_name)
    return trained


def _adapted(hf_model: Any, lora: Any) -> Any:
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            # PEFT sees to it itself, and says so.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            # PEFT on transformers 5.23; nothing that a user of ours can change.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return get_peft_model(hf_model, lora)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"no LoRA adapter of rank {lora.r} can be put on this {type(hf_model).__name__}: "
            f"{error}"
        ) from error


def _fit(
    adapted: Any, texts: Sequence[TrainingText], how: LoraTraining, *, show_progress: bool
) -> int:
    """Train the adapter; the number of tokens that entered the loss."""
    weights = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=how.lr, betas=(0.9, 0.98), weight_decay=0.05)
    n, n_rise, n_tokens = how.n_steps, max(1, how.n_steps // 20), 0
    batches = _batches(texts, how.batch_size)
    adapted.train()
    bar = progress(range(n), desc="Fine-tuning", unit="step", show=show_progress)
    for step in bar:
        share = min((step + 1) / n_rise, (n - step) / max(1, n - n_rise))
        optimizer.param_groups[0]["lr"] = how.lr * share
        loss = token_losses(adapted, next(batches))
        mean = loss.mean()
        if not bool(mean.isfinite()):
            raise FloatingPointError(
                f"the loss of the adapter is {mean.item()} at step {step}. Take a smaller learning "
                f"rate than {how.lr:g} (--lr), or a wider number format of the models (--dtype)."
            )
        mean.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        n_tokens += len(loss)
    adapted.eval()
    return n_tokens


def _batches(texts: Sequence[TrainingText], size: int) -> Iterator[list[TrainingText]]:
    """Endless passes in another order each time, from the global generator."""
    while True:
        order = torch.randperm(len(texts)).tolist()
        for start in range(0, len(order), size):
            yield [texts[i] for i in order[start : start + size]]


def token_losses(model: Any, texts: Sequence[TrainingText]) -> Float[Tensor, " n"]:
    """Cross-entropy of each token after the prompts, nats, float32."""
    device = model.device
    tokens = _rows([text.ids for text in texts], filler=0).to(device)
    labels = [
        (_IGNORED,) * n + text.ids[n:] for text in texts for n in (max(1, text.n_prompt),)
    ]  # fmt: skip
    targets = _rows(labels, filler=_IGNORED)[:, 1:].to(device)
    # Padding is on the right, where causal attention never looks.
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    counted = targets != _IGNORED
    return torch.nn.functional.cross_entropy(
        logits[counted].float(), targets[counted], reduction="none"
    )


@torch.no_grad()
def cross_entropy(model: Any, texts: Sequence[TrainingText], *, batch_size: int = 32) -> float:
    """Mean over the tokens after the prompts, nats."""
    model.eval()
    parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
    return torch.cat([token_losses(model, part) for part in parts]).double().mean().item()


def _rows(rows: Sequence[tuple[int, ...]], *, filler: int) -> Int[Tensor, "batch pos"]:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


def _save(adapted: Any, output: Path, trained: LoraTrained, *, base_name: str) -> None:
    # PEFT would name the folder that the base was loaded from.
    adapted.peft_config["default"].base_model_name_or_path = base_name
    with files.replacing(output) as folder:
        # Without the question to the hub whether the base has other embeddings.
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form
        files.write_json(folder / TRAINING_NAME, asdict(trained))


@torch.no_grad()
def weights_moved(base: Any, finetuned: Any) -> float:
    """||W^1 - W^0|| / ||W^0||, Frobenius, over the weights that two models have in common.

    NaN where they have none, or an adapter is attached beside them.
    """
    if base is finetuned:
        return 0.0
    each = [
        {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
        for model in (base, finetuned)
    ]
    shared = [n for n, own in each[0].items() if n in each[1] and each[1][n].shape == own.shape]
    if not shared or any("lora_" in name for name in each[1]):
        return math.nan
    moved = norm = 0.0
    for name in shared:
        own, other = each[0][name].float(), each[1][name].float()
        moved += (other.to(own.device) - own).square().sum().item()
        norm += own.square().sum().item()
    return math.sqrt(moved / norm)
