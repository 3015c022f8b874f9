import datasets
import pytest
import torch
from models.tiny_pairs import D_MODEL, D_VOCAB, KINDS, TEXTS
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    StandardTrainingSAEConfig,
)
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore

from tl_crosscoder.models.saelens import PairView

CONTEXT = 16

# What SAELens says of any small dataset of plain text.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples"),
    pytest.mark.filterwarnings("ignore:Dataset is not tokenized"),
    pytest.mark.filterwarnings("ignore:All samples in the training dataset have been exhausted"),
]


@pytest.fixture(scope="module")
def dataset():
    return datasets.Dataset.from_dict(
        {"text": [f"{text}. {i}" for text in TEXTS for i in range(20)]}
    )


@pytest.fixture
def sae():
    """One latent for each coordinate: exact where activations are positive and zero elsewhere."""
    metadata = SAEMetadata(hook_name="hook_sites", hook_head_index=None, prepend_bos=True)
    return StandardSAE(StandardSAEConfig(d_in=2 * D_MODEL, d_sae=8, metadata=metadata))


def store_for(pair, dataset, **changes):
    settings = {
        "model": PairView(pair),
        "dataset": dataset,
        "streaming": False,
        "hook_name": "hook_sites",
        "hook_head_index": None,
        "context_size": CONTEXT,
        "d_in": 2 * D_MODEL,
        "n_batches_in_buffer": 4,
        "total_training_tokens": 1000,
        "store_batch_size_prompts": 3,
        "train_batch_size_tokens": 32,
        "prepend_bos": True,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    return ActivationsStore(**{**settings, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_harvests_the_pair(pairs, kind, dataset):
    pair = pairs[kind]
    harvested, ids = store_for(pair, dataset).get_raw_llm_batch()
    tokens = store_for(pair, dataset).get_batch_tokens()
    assert torch.equal(ids, tokens.flatten())
    assert tokens.shape == (3, CONTEXT)
    expected = pair.activations(tokens).reshape(-1, 2 * D_MODEL)
    assert torch.equal(harvested, expected)
    assert next(store_for(pair, dataset)).shape == (32, 2 * D_MODEL)


def test_harvesting_never_runs_the_rest_of_a_model(pairs, tokens):
    pair = pairs["llama"]
    ran = []
    with pair.models[1].hooks(fwd_hooks=[("unembed.hook_in", lambda _, hook: ran.append(hook))]):
        store_like = {"names_filter": ["hook_sites"], "stop_at_layer": None, "prepend_bos": False}
        out, cache = PairView(pair).run_with_cache(pair.to_tokens(TEXTS), **store_like)
    assert not ran
    assert torch.equal(out, cache["hook_sites"])


def test_logits_and_loss_are_those_of_the_finetuned_model(pair, tokens):
    view = PairView(pair)
    expected = pair.logits(tokens)
    assert torch.equal(view(tokens), expected)
    log_p = expected.log_softmax(dim=-1)
    # Position i predicts token i + 1.
    by_hand = -log_p[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    logits, loss = view(tokens, return_type="both", loss_per_token=True)
    assert torch.equal(logits, expected)
    torch.testing.assert_close(loss, by_hand)
    torch.testing.assert_close(view(tokens, return_type="loss"), by_hand.mean())
    _, cache = view.run_with_cache(tokens)
    assert torch.equal(cache["hook_sites"].unflatten(-1, (2, D_MODEL)), pair.activations(tokens))


def test_an_edit_at_the_hook_continues_in_the_finetuned_model(pair, tokens):
    view = PairView(pair)

    def swap(activation, hook):
        return activation.unflatten(-1, (2, D_MODEL)).flip(dims=[2]).flatten(start_dim=2)

    swapped = view.run_with_hooks(tokens, fwd_hooks=[("hook_sites", swap)])
    base_stream = pair.activations(tokens)[:, :, 0]
    assert torch.equal(swapped, pair.run_with_patch(tokens, base_stream))
    assert torch.equal(view(tokens), pair.logits(tokens))


def test_text_goes_in_as_in_transformer_lens(pairs):
    pair = pairs["llama"]
    view = PairView(pair)
    assert torch.equal(view.to_tokens(TEXTS), pair.to_tokens(TEXTS))
    assert view.to_tokens(TEXTS[0] * 20, truncate=False).shape[1] > pair.n_ctx
    assert view.to_tokens(TEXTS[0] * 20).shape[1] == pair.n_ctx
    assert torch.equal(view(TEXTS), pair.logits(pair.to_tokens(TEXTS)))
    sizes = (view.cfg.d_vocab, view.cfg.d_model, view.cfg.n_ctx)
    assert sizes == (D_VOCAB, 2 * D_MODEL, pair.n_ctx)
    assert view.cfg.device == pair.device
    for wrong in ({"stop_at_layer": 1}, {"return_type": "predictions"}):
        with pytest.raises(ValueError, match="stop_at_hook=True"):
            view(TEXTS, **wrong)


def test_the_evaluator_of_sae_lens_splices_reconstructions(pairs, dataset, sae):
    pair = pairs["llama"]
    store = store_for(pair, dataset)
    config = EvalConfig(
        n_eval_reconstruction_batches=2,
        n_eval_sparsity_variance_batches=2,
        compute_kl=True,
        compute_ce_loss=True,
        compute_variance_metrics=True,
    )
    metrics, _ = run_evals(sae, store, PairView(pair), ActivationScaler(), eval_config=config)
    preserved = metrics["model_performance_preservation"]
    # A random dictionary is not the identity, so splicing it in must move the loss.
    assert preserved["ce_loss_with_sae"] != preserved["ce_loss_without_sae"]
    assert metrics["model_behavior_preservation"]["kl_div_with_ablation"] > 0


def test_the_training_runner_of_sae_lens_trains_on_a_pair(pairs, dataset, tmp_path):
    config = LanguageModelSAERunnerConfig(
        sae=StandardTrainingSAEConfig(d_in=2 * D_MODEL, d_sae=8),
        model_name="pair",
        hook_name="hook_sites",
        dataset_path="memory",
        streaming=False,
        is_dataset_tokenized=False,
        context_size=CONTEXT,
        training_tokens=256,
        train_batch_size_tokens=32,
        store_batch_size_prompts=2,
        n_batches_in_buffer=4,
        lr_end=1e-5,
        logger=LoggingConfig(log_to_wandb=False),
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(tmp_path),
    )
    runner = LanguageModelSAETrainingRunner(
        config, override_dataset=dataset, override_model=PairView(pairs["llama"])
    )
    before = runner.sae.W_dec.detach().clone()
    trained = runner.run()
    assert not torch.equal(trained.W_dec, before)
    assert trained.cfg.metadata.hook_name == "hook_sites"
