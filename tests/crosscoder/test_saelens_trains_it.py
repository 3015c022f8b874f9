"""SAELens's own trainers on our training class: alone, and on a pair presented as one model."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from dictionaries import new_training, planted
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAE, TrainingSAE

from tl_crosscoder import L1, BatchTopK, Crosscoder, CrosscoderTraining, CrosscoderTrainingConfig
from tl_crosscoder.models.saelens import PairView

BATCH = 64


def trainer_config(n_steps):
    return SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=n_steps * BATCH,
        device="cpu",
        autocast=False,
        lr=1e-2,
        lr_end=1e-3,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH,
        dead_feature_window=10,
        feature_sampling_window=1000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=5,
    )


@pytest.mark.parametrize(
    "sparsity", [L1(coefficient=0.01, warm_up_steps=20), BatchTopK(k=4, threshold_momentum=0.9)]
)
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_sae_trainer_trains_it_on_stacked_sites(sparsity, normalize, tmp_path):
    """Where SAELens normalises, activations are ten times larger than the weights are made for."""
    n_steps = 300
    scale = 1.0 if normalize == "none" else 10.0
    training = new_training(sparsity=sparsity, normalize_activations=normalize)
    batches = (scale * planted(BATCH, seed=s) for s in range(n_steps + 20))
    SAETrainer(trainer_config(n_steps), training, batches).fit()
    training.save_inference_model(tmp_path)
    crosscoder = Crosscoder.load(tmp_path)
    x = scale * planted(1000, seed=9999)
    left = (crosscoder(x) - x).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
    assert left < 0.5
    training.eval()
    torch.testing.assert_close(
        training(x.flatten(1)), crosscoder(x.flatten(1)), atol=1e-2, rtol=1e-3
    )
    if normalize == "expected_average_only_in":
        assert {s.scale for s in crosscoder.sites} != {1.0}
        torch.testing.assert_close(crosscoder.decoder_norms().sum(dim=-1), torch.ones(32))


def test_a_training_checkpoint_of_saelens_loads_in_both_forms(tmp_path):
    training = new_training()
    training.save_model(tmp_path)
    assert isinstance(TrainingSAE.load_from_disk(tmp_path), CrosscoderTraining)
    assert TrainingSAE.load_from_disk(tmp_path).cfg.sparsity == BatchTopK(k=4)
    assert isinstance(SAE.load_from_disk(tmp_path), Crosscoder)


@pytest.mark.filterwarnings("ignore:\\nThis SAE has non-empty:UserWarning")
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
def test_the_language_model_runner_trains_a_pair(taboo_pair, texts, tmp_path):
    rows = [{"tokens": row} for row in texts[0].tokens.tolist()]
    config = LanguageModelSAERunnerConfig(
        sae=CrosscoderTrainingConfig(
            d_in=192, d_sae=64, sites=taboo_pair.sites, sparsity=BatchTopK(k=4)
        ),
        model_name="a pair",
        hook_name="hook_sites",
        dataset_path="",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=32,
        training_tokens=100 * 128,
        train_batch_size_tokens=128,
        store_batch_size_prompts=8,
        n_batches_in_buffer=4,
        lr=3e-3,
        device="cpu",
        output_path=str(tmp_path / "out"),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(
        config,
        override_dataset=Dataset.from_list(rows),
        override_model=PairView(taboo_pair),
    )
    runner.run()
    crosscoder = Crosscoder.load(tmp_path / "out")
    assert [dataclasses.replace(s, scale=1.0) for s in crosscoder.sites] == list(taboo_pair.sites)
    x = taboo_pair.activations(texts[1].tokens)[texts[1].mask]
    assert (crosscoder(x) - x).pow(2).sum() < 0.8 * (x - x.mean(dim=0)).pow(2).sum()
    assert crosscoder.decoder("finetuned").shape == (64, 96)
