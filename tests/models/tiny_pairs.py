"""Tiny random models: HookedTransformers, and folders of three families for bridges."""

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

D_MODEL, N_LAYERS, N_CTX, D_VOCAB = 16, 3, 64, 300
HOOK = "blocks.1.hook_resid_post"
TEXTS = ["The cat sat on the mat and ran", "A dog", "Once upon a time, a cat ran"]
CORPUS = [
    *TEXTS,
    "the dog ate the fish; the bird sang 2 songs.",
    "naïve plans: run, hide",
] * 3

SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
    # Wide enough for greedy text to vary and for a patch to show in the logits.
    "initializer_range": 0.3,
}
FAMILIES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
KINDS = ["hooked", *FAMILIES, "mixed"]


def save_tokenizer(folder: Path, *, padding_side: str = "right", **special: Any) -> None:
    """Byte-level BPE with `special` tokens, in the order given, at ids 0, 1, ..."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB - 10,
        special_tokens=[token for token in special.values() if token is not None],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        clean_up_tokenization_spaces=False,
        padding_side=padding_side,
        **special,
    )
    fast.save_pretrained(folder)


def save_model(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    *,
    has_tokenizer: bool = True,
    **changes: Any,
) -> Path:
    """A random model of a family with a tokenizer; each family has its tokenizer's habit."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **changes}))
    model.save_pretrained(folder)
    if not has_tokenizer:
        return folder
    save_tokenizer(
        folder,
        padding_side="left" if family == "gemma2" else "right",
        bos_token=None if family == "qwen3" else "<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    return folder


def save_adapter(folder: Path, base: Path, *, is_zero: bool = False, **changes: Any) -> Path:
    """A LoRA adapter for a saved model: random, or one that adds nothing."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"], **changes})
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        # What begins as zero: of an embedding it is the other matrix.
        if ("lora_B" in name or "lora_embedding_A" in name) and not is_zero:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return folder


def hooked_transformer(tokenizer: Any, seed: int, **changes: Any) -> Any:
    """A random HookedTransformer with raw weights."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    settings: dict[str, Any] = {
        "n_layers": N_LAYERS,
        "d_model": D_MODEL,
        "n_ctx": N_CTX,
        "d_head": 4,
        "n_heads": 4,
        "d_mlp": 32,
        "d_vocab": D_VOCAB,
        "act_fn": "silu",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "gated_mlp": True,
        "initializer_range": 0.3,
        "seed": seed,
        "device": "cpu",
    }
    config = HookedTransformerConfig(**{**settings, **changes})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="HookedTransformer is deprecated")
        return HookedTransformer(config, tokenizer=tokenizer)
