import pytest
import torch
from jaxtyping import TypeCheckError
from models.tiny_pairs import (
    D_MODEL,
    D_VOCAB,
    HOOK,
    N_CTX,
    TEXTS,
    hooked_transformer,
    save_tokenizer,
)
from transformers import AutoTokenizer

from tl_crosscoder.models.pair import ModelPair, Site


def test_activations_equal_an_uninterrupted_run_with_cache(pair, tokens):  # spec: D1
    activations = pair.activations(tokens)
    assert activations.shape == (*tokens.shape, 2, D_MODEL)
    assert activations.dtype == torch.float32
    assert pair.activations(tokens, dtype=torch.bfloat16).dtype == torch.bfloat16
    for i, model in enumerate(pair.models):
        _, cache = model.run_with_cache(tokens, padding_side="right")
        assert torch.equal(activations[:, :, i], cache[HOOK])


def test_right_padding_changes_no_real_token(pair):
    tokens, mask = pair.to_tokens_and_mask(TEXTS)
    padded = pair.activations(tokens)
    for row, text in enumerate(TEXTS):
        alone = pair.activations(pair.to_tokens(text))[0]
        torch.testing.assert_close(padded[row][mask[row]], alone, atol=1e-4, rtol=1e-4)


def test_layers_after_the_hook_do_not_run(pair, tokens):
    ran = []
    later = "blocks.2.hook_resid_mid"
    watch = [(later, lambda _, hook: ran.append(hook.name))]
    with pair.models[0].hooks(fwd_hooks=watch), pair.models[1].hooks(fwd_hooks=watch):
        pair.activations(tokens)
    assert not ran


@pytest.mark.parametrize("kind", ["hooked", "llama"])
@pytest.mark.parametrize(
    ("hook_name", "d_model"),
    [
        ("hook_embed", D_MODEL),
        ("blocks.0.hook_resid_pre", D_MODEL),
        ("blocks.1.hook_resid_mid", D_MODEL),
        ("blocks.1.hook_mlp_out", D_MODEL),
        ("blocks.1.mlp.hook_post", 32),
        ("blocks.1.attn.hook_z", 4 * 4),
        ("blocks.2.hook_resid_post", D_MODEL),
        ("ln_final.hook_normalized", D_MODEL),
    ],
)
def test_other_hooks_equal_their_cache_with_heads_flattened(pairs, kind, hook_name, d_model):
    pair = ModelPair(*pairs[kind].models, hook_name=hook_name)
    tokens = pair.to_tokens(TEXTS)
    assert pair.d_model == d_model
    activations = pair.activations(tokens)
    for i, model in enumerate(pair.models):
        _, cache = model.run_with_cache(tokens, padding_side="right")
        assert torch.equal(activations[:, :, i], cache[hook_name].flatten(start_dim=2))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.tensor([[5, D_VOCAB]]), rf"run from 5 to {D_VOCAB}, .* 0 to {D_VOCAB - 1}"),
        (torch.tensor([[-1, 5]]), "run from -1 to 5"),
        (torch.zeros((0, 4), dtype=torch.long), r"shape \(0, 4\)"),
        (
            torch.zeros((1, N_CTX + 1), dtype=torch.long),
            f"{N_CTX + 1} tokens .* context of {N_CTX}",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["hooked", "llama"])
def test_bad_tokens_are_refused(pairs, kind, tokens, message):
    pair = pairs[kind]
    with pytest.raises(ValueError, match=message):
        pair.activations(tokens)
    with pytest.raises(ValueError, match=message):
        pair.logits(tokens)


@pytest.mark.parametrize("tokens", [torch.tensor([1, 2, 3]), torch.zeros((1, 2))])
def test_what_is_not_a_batch_of_ids_is_refused(pairs, tokens):
    # Whichever looks first: the check of the annotation, or our own, which users see.
    with pytest.raises(
        (ValueError, TypeCheckError), match=r"are not ids \[batch, pos\]|Type-check"
    ):
        pairs["llama"].activations(tokens)


def test_a_site_survives_its_dict(pair):
    for site in pair.sites:
        assert Site.from_dict(site.to_dict()) == site
    assert pair.n_sites == 2
    assert [pair.site_index(site.name) for site in pair.sites] == [0, 1]
    with pytest.raises(
        ValueError, match=r"'tuned' is not in this pair; it has \['base', 'finetuned'\]"
    ):
        pair.model("tuned")


def test_repr_says_what_is_compared(pairs):
    text = repr(pairs["hooked"])
    assert "\n" not in text
    for part in ("base='custom'", HOOK, f"d_model={D_MODEL}", "weights='raw'", "device='cpu'"):
        assert part in text


def test_a_tokenizer_that_pads_left_masks_nothing(tokenizer, tmp_path):
    """HookedTransformer would mask leading ids of the padding token, a bridge would not."""
    save_tokenizer(
        tmp_path, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    left = AutoTokenizer.from_pretrained(tmp_path)
    assert left.padding_side == "left"
    tokens = torch.tensor([[2, 2, 9, 30]])
    made = [
        ModelPair(*[hooked_transformer(t, seed) for seed in (0, 1)], hook_name=HOOK, tokenizer=t)
        for t in (left, tokenizer)
    ]
    assert torch.equal(made[0].activations(tokens), made[1].activations(tokens))
    assert torch.equal(made[0].logits(tokens), made[1].logits(tokens))
