"""Loss and gradients of both twins of the step against `naive_step`, for every member.

The sparse twin declines where codes are dense, as in small dictionaries: here it is made to run.
"""

from dataclasses import dataclass

import pytest
import torch
from dictionaries import new_training, sites
from hypothesis import given, settings
from hypothesis import strategies as st
from members import EQUAL_WIDTHS, MEMBERS, WITH_DELTA
from naive_step import NaiveWeights, naive_losses, part_latents, site_matrices, the_parts
from torch import Tensor

from tl_crosscoder import CrosscoderTraining, CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.config import AuxK
from tl_crosscoder.crosscoder.sparse.codes import Codes, DenseCodes, SparseCodes

KERNELS = {"auto": SparseCodes, "dense": DenseCodes}
both_twins = pytest.mark.parametrize("kernels", KERNELS)
every_member = pytest.mark.parametrize("name", MEMBERS)
few = settings(max_examples=25, deadline=None)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    widths: tuple[int, ...]
    batch: int = 8
    d_sae: int = 24
    k: float = 2
    seed: int = 0
    kind: str = "random"
    """`grid`: quarters, whose sums and norms are exact; `twins`: the same with every latent twice;
    `negative`: no pre-activation is positive."""
    n_dead: int = 0
    reconstruction: str = "sum"

    @property
    def is_exact(self) -> bool:
        return self.kind in ("grid", "twins")


@st.composite
def widths_for(draw, name: str) -> tuple[int, ...]:
    """One to three sites; delta losses and exclusive parts want two, some want them alike."""
    n_sites = draw(st.integers(2 if name in (*WITH_DELTA, "dfc") else 1, 3))
    widths = [draw(st.integers(1, 6)) for _ in range(n_sites)]
    if name in EQUAL_WIDTHS:
        widths = widths[:1] * n_sites
    if name in WITH_DELTA:
        widths[-1] = widths[0]
    return tuple(widths)


@st.composite
def cases(draw, name: str) -> Case:
    d_sae = draw(st.integers(8, 40))
    return Case(
        name=name,
        widths=draw(widths_for(name)),
        batch=draw(st.integers(1, 12)),
        d_sae=d_sae,
        k=draw(st.sampled_from([0.75, 1, 1.5, 2, 3])),
        seed=draw(st.integers(0, 2**31)),
        kind=draw(st.sampled_from(["random", "grid", "twins", "negative"])),
        n_dead=draw(st.one_of(st.just(0), st.just(d_sae), st.integers(1, d_sae))),
        reconstruction=draw(st.sampled_from(["sum", "mean", "norm"])),
    )


class Draw:
    """Numbers for a case, from its seed."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.generator = torch.Generator().manual_seed(case.seed)

    def numbers(self, *shape: int) -> Tensor:
        if self.case.is_exact:
            return torch.randint(-4, 5, shape, generator=self.generator).double() / 4
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def encoder(self, width: int, n: int) -> Tensor:
        return twice(self.case, self.numbers(width, n).T).T.contiguous().requires_grad_()

    def decoder(self, n: int, width: int) -> Tensor:
        """On the grid one entry a row, so that norms are exact too."""
        if not self.case.is_exact:
            return self.numbers(n, width).requires_grad_()
        rows = torch.zeros(n, width, dtype=torch.float64)
        place = torch.randint(width, (n,), generator=self.generator)
        size = torch.randint(1, 5, (n,), generator=self.generator).double() / 2
        rows[torch.arange(n), place] = size
        return twice(self.case, rows).requires_grad_()

    def bias(self, cfg: CrosscoderTrainingConfig) -> Tensor:
        sizes = [len(latents) for latents in part_latents(cfg)]
        bias = torch.cat([twice(self.case, self.numbers(n)) for n in sizes])
        return (bias - 100 * (self.case.kind == "negative")).requires_grad_()

    def log_threshold(self, n: int) -> Tensor:
        """On the grid theta is 1: codes stand exactly on the edges of the window around it."""
        return (0 * self.numbers(n) if self.case.is_exact else self.numbers(n)).requires_grad_()


def twice(case: Case, rows: Tensor) -> Tensor:
    """The first of every two rows, twice, where the case asks for it."""
    return rows[torch.arange(len(rows)) // 2 * 2] if case.kind == "twins" else rows


def drawn_weights(cfg: CrosscoderTrainingConfig, case: Case, draw: Draw) -> NaiveWeights:
    enc, dec = [], []
    for part, latents in zip(the_parts(cfg), part_latents(cfg), strict=True):
        n, tied = len(latents), draw.decoder(len(latents), case.widths[0])
        reads = [part.reads is None or s.name in part.reads for s in cfg.sites]
        writes = [part.writes is None or s.name in part.writes for s in cfg.sites]
        sized = [*zip(case.widths, reads, writes, strict=True)]
        enc.append([draw.encoder(w, n) if reads else None for w, reads, _ in sized])
        rows = [draw.decoder(n, w) if writes else None for w, _, writes in sized]
        dec.append([tied] * len(sized) if part.tied else rows)
    return NaiveWeights(
        enc=enc,
        dec=dec,
        b_enc=draw.bias(cfg),
        b_dec=[draw.numbers(w).requires_grad_() for w in case.widths],
        log_threshold=draw.log_threshold(case.d_sae),
    )


def training_with(
    case: Case, *, kernels: str = "auto", dtype: str = "float64"
) -> CrosscoderTraining:
    """A model of the case. Of equal dead latents AuxK takes any: on the grid it takes them all."""
    names = [s.name for s in sites(*case.widths)]
    training = new_training(
        *case.widths,
        d_sae=case.d_sae,
        dtype=dtype,
        kernels=kernels,
        reconstruction=case.reconstruction,
        auxk=AuxK(k=case.d_sae if case.is_exact else None),
        **MEMBERS[case.name](case.k, names),
    )
    training._sparse_step.max_density = float("inf")
    return training


@torch.no_grad()
def write_(training: CrosscoderTraining, weights: NaiveWeights) -> None:
    encoders, decoders = site_matrices(training.cfg, weights)
    training.W_enc.copy_(torch.cat(encoders, dim=0))
    training.W_dec.copy_(torch.cat(decoders, dim=1))
    training.b_enc.copy_(weights.b_enc)
    training.b_dec.copy_(torch.cat(weights.b_dec))
    if hasattr(training, "log_threshold"):
        training.log_threshold.copy_(weights.log_threshold)


def assert_equal(actual: Tensor, expected: Tensor | None, what: str, *, size: float = 0.0) -> None:
    """To 1e-6 of the size of the expected value, or of the other gradients where these are 0."""
    expected = torch.zeros_like(actual) if expected is None else expected
    error = (actual - expected).norm().item()
    limit = 1e-6 * expected.norm().item() + 1e-12 * (1 + size)
    assert error <= limit, f"{what}: {actual} is not {expected}"


def assert_equal_gradients(training: CrosscoderTraining, weights: NaiveWeights) -> None:
    """Tied rows: the package keeps one copy a site and gives each the mean gradient."""
    size = max((w.grad.norm().item() for w in weights.leaves() if w.grad is not None), default=0.0)
    by_part = zip(the_parts(training.cfg), part_latents(training.cfg), strict=True)
    widths = [s.d_model for s in training.sites]
    for p, (part, latents) in enumerate(by_part):
        own = slice(latents.start, latents.stop)
        for m, block in enumerate(training.W_enc.grad[:, own].split(widths, dim=0)):
            expected = weights.enc[p][m]
            assert_equal(block, None if expected is None else expected.grad, "W_enc", size=size)
        blocks = training.W_dec.grad[own].split(widths, dim=1)
        if part.tied:
            assert all(torch.equal(b, blocks[0]) for b in blocks)
            assert_equal(sum(blocks), weights.dec[p][0].grad, "W_dec of tied", size=size)
            continue
        for expected, block in zip(weights.dec[p], blocks, strict=True):
            assert_equal(block, None if expected is None else expected.grad, "W_dec", size=size)
    assert_equal(training.b_enc.grad, weights.b_enc.grad, "b_enc", size=size)
    b_dec = torch.cat([b.grad for b in weights.b_dec])
    assert_equal(training.b_dec.grad, b_dec, "b_dec", size=size)
    if hasattr(training, "log_threshold"):
        theta = weights.log_threshold.grad
        assert_equal(training.log_threshold.grad, theta, "log_threshold", size=size)


def assert_counts_as_the_matrix(codes: Codes) -> None:
    """What is told of activity is that of the matrix of codes; entries may be 0 in a JumpReLU."""
    dense = codes.to_dense().detach()
    assert codes.l0().item() == pytest.approx((dense > 0).sum().item() / len(dense))
    assert torch.equal(codes.fired(), (dense > 0).any(dim=0))
    weights = torch.arange(1.0, dense.shape[1] + 1).to(dense)
    for part in (slice(0, 5), slice(5, dense.shape[1])):
        positive = (dense * weights)[:, part][dense[:, part] > 0].tolist()
        assert codes.smallest(weights, part).item() == min(positive, default=float("inf"))


def compare(case: Case, kernels: str, *, step: int = 3, **options) -> None:
    training, draw = training_with(case, kernels=kernels), Draw(case)
    weights = drawn_weights(training.cfg, case, draw)
    write_(training, weights)
    x = [draw.numbers(case.batch, width) for width in case.widths]
    dead = torch.randperm(case.d_sae, generator=draw.generator)[: case.n_dead]
    mask = torch.zeros(case.d_sae, dtype=torch.bool)
    mask[dead] = True
    expected = naive_losses(training.cfg, weights, x, dead=dead.tolist(), step=step, **options)
    output = training.step_loss(torch.cat(x, dim=-1), is_dead=mask, step=step, **options)
    assert type(output.codes) is KERNELS[kernels]
    assert_counts_as_the_matrix(output.codes)
    assert set(output.losses) == set(expected)
    for name, loss in expected.items():
        assert_equal(output.losses[name], loss, name)
    assert_equal(output.loss, sum(expected.values()), "loss")
    sum(expected.values()).backward()
    output.loss.backward()
    assert_equal_gradients(training, weights)


@both_twins
@every_member
@few
@given(data=st.data())
def test_loss_and_gradients_equal_the_naive_ones(name, kernels, data):
    compare(data.draw(cases(name)), kernels)


@both_twins
@pytest.mark.parametrize("name", ["l1", "dsf", "jumprelu", "jumprelu-ste-to-input"])
def test_penalties_take_the_weights_that_are_handed_in(name, kernels):
    case = Case(name=name, widths=(3, 3), seed=1)
    compare(case, kernels, coefficients={"l1": 0.7, "tanh": 0.9})
    compare(case, kernels, coefficients={"l1": 0.0, "tanh": 0.0})


@both_twins
@every_member
def test_the_terms_add_up_to_the_loss_and_stacked_input_is_flat_input(name, kernels):
    training = training_with(Case(name=name, widths=(4, 4)), kernels=kernels)
    dead = torch.arange(24) % 3 == 0
    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(3)).double()
    output = training.step_loss(x, is_dead=dead)
    terms = [term.item() for term in output.losses.values()]
    assert output.loss.item() == pytest.approx(sum(terms), rel=1e-12)
    assert torch.equal(output.x, x.flatten(1))
    training = training_with(Case(name=name, widths=(4, 4)), kernels=kernels)
    assert torch.equal(training.step_loss(x.flatten(1), is_dead=dead).loss, output.loss)


@both_twins
@pytest.mark.parametrize("step", range(6))
def test_k_is_annealed_to_the_step(step, kernels):
    # k = 2 from 4 over four steps: 4, 3.5, 3, 2.5, 2, 2; of 8 tokens 32, 28, 24, 20, 16, 16.
    case = Case(name="batchtopk-annealed", widths=(3, 3), batch=8)
    compare(case, kernels, step=step)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    codes = training_with(case, kernels=kernels).step_loss(x, step=step).codes
    assert round(8 * codes.l0().item()) == [32, 28, 24, 20, 16, 16][step]


@both_twins
def test_a_relative_delta_loss_is_divided_by_the_running_mean(kernels):
    case = Case(name="delta-relative", widths=(3, 3))
    training, draw = training_with(case, kernels=kernels), Draw(case)
    weights = drawn_weights(training.cfg, case, draw)
    write_(training, weights)
    mean = None
    for scale in (1.0, 10.0, 0.1):
        x = [scale * draw.numbers(case.batch, 3) for _ in range(2)]
        expected = naive_losses(training.cfg, weights, x, mean_squared_difference=mean)
        output = training.step_loss(torch.cat(x, dim=-1))
        assert_equal(output.losses["delta"], expected["delta"], f"delta at {scale}")
        now = (x[1] - x[0]).pow(2).sum(dim=-1).mean().item()
        # Begun with the first observation, and moved by a hundredth of each of the others.
        mean = now if mean is None else 0.99 * mean + 0.01 * now


@pytest.mark.parametrize("prefilter", [True, False], ids=["bounds", "float32"])
@every_member
def test_in_float32_it_is_the_same_loss_up_to_rounding(name, prefilter):
    case = Case(name=name, widths=(6, 6), batch=12, d_sae=32)
    training, draw = training_with(case, dtype="float32"), Draw(case)
    training._sparse_step.prefilter = prefilter
    weights = drawn_weights(training.cfg, case, draw)
    write_(training, weights)
    # Activations that float32 holds exactly, so that nothing but the arithmetic differs.
    x = [draw.numbers(case.batch, width).float() for width in case.widths]
    expected = sum(naive_losses(training.cfg, weights, [x_m.double() for x_m in x]).values())
    output = training.step_loss(torch.cat(x, dim=-1))
    assert type(output.codes) is SparseCodes
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["batchtopk", "topk", "l1", "jumprelu"])
def test_dense_codes_and_hooks_get_the_dense_step(name):
    """All latents of an untrained L1 are active half the time: more than one in 16."""
    case = Case(name=name, widths=(3, 3), k=2)
    training, x = training_with(case), torch.randn(8, 6).double()
    assert type(training.step_loss(x).codes) is SparseCodes
    training._sparse_step.max_density = 1 / 16
    assert type(training.step_loss(x).codes) is DenseCodes  # 2 of 24 latents is one in 12.
    training._sparse_step.max_density = float("inf")
    seen = []
    training.hook_sae_acts_pre.add_hook(lambda pre, hook: seen.append((hook.name, pre.shape)))
    assert type(training.step_loss(x).codes) is DenseCodes
    assert seen == [("hook_sae_acts_pre", (8, 24))]
