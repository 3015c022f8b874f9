"""SAELens beside this package: with one site the same training; its trainers on our class.

With one site a crosscoder is an SAE and trains like SAELens's, where the losses coincide. Set for
that: in SAELens `apply_b_dec_to_input=False`, for JumpReLU the `tanh` sparsity loss and no
pre-activation loss; here `auxk=None`, since the two AuxK terms are normalised differently. Three
more differences change no loss: theirs scales codes by the decoder norm and back, has theta itself
and not its logarithm for a parameter, and the whole dictionary is the last width of a matryoshka.
"""

import dataclasses

import pytest
import torch
from datasets import Dataset
from dictionaries import D_MODEL, new_training, planted
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from tl_crosscoder import (
    L1,
    BatchTopK,
    Crosscoder,
    CrosscoderTraining,
    JumpReLU,
    TopK,
    TrainConfig,
    Trainer,
)
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig
from tl_crosscoder.models.saelens import PairView

D_SAE, BATCH = 40, 64
SIZE = {"d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": False, "dtype": "float64"}
WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
both_steps = pytest.mark.parametrize("kernels", ["auto", "dense"])
SAES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 3}, {"sparsity": TopK(k=3)}),
    "batchtopk": (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        {"k": 3},
        {"sparsity": BatchTopK(k=3)},
    ),
    # 0.25, 0.5 and 1 of 40 latents, and the whole in either case.
    "matryoshka": (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"k": 3, "matryoshka_widths": [10, 20, 40]},
        {"sparsity": BatchTopK(k=3), "matryoshka": (0.25, 0.5)},
    ),
    "l1": (
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
        {"l1_coefficient": 0.2},
        {"sparsity": L1(coefficient=0.2)},
    ),
}


def ours(kernels: str, **fields) -> CrosscoderTraining:
    fields |= {"auxk": None, "dtype": "float64", "kernels": kernels}
    return new_training(D_MODEL, d_sae=D_SAE, **fields)


def batch(step: int) -> Tensor:
    return planted(BATCH, seed=step)[:, 1].double()


def their_loss(sae: TrainingSAE, x: Tensor) -> Tensor:
    names = {"l1": 0.2, "l0": 0.7}
    step_input = TrainStepInput(
        sae_in=x,
        coefficients=names,
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    return sae.training_forward_pass(step_input).loss


@both_steps
@pytest.mark.parametrize("name", SAES)
def test_one_site_trains_like_saelens(name, kernels):  # spec: C12
    """The same loss over 50 steps of Adam, and the same weights after them."""
    sae, config, options, fields = SAES[name]
    torch.manual_seed(0)
    theirs, training = sae(config(**options, **SIZE)), ours(kernels, **fields)
    with torch.no_grad():
        for weight in WEIGHTS:
            getattr(training, weight).copy_(getattr(theirs, weight))
    optimizers = [torch.optim.Adam(m.parameters(), lr=1e-3) for m in (training, theirs)]
    for step in range(50):
        losses = [training.step_loss(batch(step)).loss, their_loss(theirs, batch(step))]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-9)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for weight in WEIGHTS:
        torch.testing.assert_close(getattr(training, weight), getattr(theirs, weight))


@both_steps
@pytest.mark.parametrize("ste_to_input", [False, True])
def test_one_site_jumprelu_has_saelenss_loss_and_gradients(ste_to_input, kernels):  # spec: C12
    """At each of 30 steps of theirs; ours are with respect to log theta, which is theta times."""
    torch.manual_seed(0)
    theirs = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            jumprelu_sparsity_loss_mode="tanh",
            jumprelu_init_threshold=0.25,
            jumprelu_bandwidth=0.5,
            jumprelu_ste_to_input=ste_to_input,
            **SIZE,
        )
    )
    sparsity = JumpReLU(coefficient=0.7, bandwidth=0.5, ste_to_input=ste_to_input)
    training = ours(kernels, sparsity=sparsity)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for step in range(30):
        copy_from_(training, theirs)
        losses = [training.step_loss(batch(step)).loss, their_loss(theirs, batch(step))]
        torch.testing.assert_close(*losses)
        for model, loss in zip((training, theirs), losses, strict=True):
            model.zero_grad()
            loss.backward()
        for weight in WEIGHTS:
            torch.testing.assert_close(
                getattr(training, weight).grad, getattr(theirs, weight).grad, atol=1e-9, rtol=1e-6
            )
        # Their theta is float32.
        by_log = theirs.threshold.grad.double() * theirs.threshold.double()
        torch.testing.assert_close(training.log_threshold.grad, by_log, atol=1e-6, rtol=1e-5)
        optimizer.step()
    assert theirs.threshold.unique().numel() > 1


@torch.no_grad()
def copy_from_(training: CrosscoderTraining, theirs: JumpReLUTrainingSAE) -> None:
    for weight in WEIGHTS:
        getattr(training, weight).copy_(getattr(theirs, weight))
    training.log_threshold.copy_(theirs.threshold.double().log())


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
def test_sae_trainer_trains_it_on_stacked_sites(sparsity, normalize, tmp_path):  # spec: C12
    """Where SAELens normalises, activations are ten times larger than the weights are made for."""
    n_steps = 150
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
def test_the_language_model_runner_trains_a_pair(taboo_pair, texts, tmp_path):  # spec: C12
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
        training_tokens=60 * 128,
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


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:The training dataset contains fewer samples:UserWarning")
@pytest.mark.parametrize("is_difference", [False, True])
def test_a_store_of_saelens_is_made_from_what_a_dictionary_records(
    taboo_pair, texts, tmp_path, is_difference
):  # spec: C12
    pair = taboo_pair.difference() if is_difference else taboo_pair
    config = TrainConfig(d_sae=32, n_tokens=512, batch_size=128, n_calibration_tokens=256)
    Trainer(pair, *texts, config=config, output=tmp_path / "run").fit()
    crosscoder = Crosscoder.load(tmp_path / "run")
    rows = Dataset.from_list([{"tokens": row} for row in texts[1].tokens.tolist()])
    options = {"streaming": False, "store_batch_size_prompts": 3, "train_batch_size_tokens": 64}
    store = ActivationsStore.from_sae(PairView(pair), crosscoder, rows, **options)
    tokens = store.get_batch_tokens()
    assert tokens.shape == (3, texts[0].context_size)
    assert (tokens[:, 0] == pair.tokenizer.bos_token_id).all()
    acts = store.get_activations(tokens)
    assert torch.equal(acts.view(3, 32, -1), pair.activations(tokens).flatten(2))
    assert crosscoder(acts.flatten(0, -2)).shape == (96, crosscoder.cfg.d_in)
