"""Loss and gradients of both steps, sparse and dense, against `reference/nano_crosscoder`."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from dictionaries import (
    EQUAL_WIDTHS,
    MEMBERS,
    WITH_DELTA,
    members,
    new_training,
    planted,
    randomised,
    sites,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import nano_crosscoder as nano
from torch import Tensor

from tl_crosscoder import L1, CrosscoderTraining, JumpReLU, TopK
from tl_crosscoder.crosscoder.config import AuxK, CrosscoderTrainingConfig
from tl_crosscoder.crosscoder.sparse.codes import Codes, DenseCodes, SparseCodes

KERNELS = {"auto": SparseCodes, "dense": DenseCodes}
both_steps = pytest.mark.parametrize("kernels", KERNELS)
every_member = pytest.mark.parametrize("name", MEMBERS)
few = settings(max_examples=15, deadline=None)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    widths: tuple[int, ...]
    batch: int = 8
    d_sae: int = 24
    k: float = 2
    seed: int = 0
    kind: str = "random"
    """`grid`: quarters, whose sums and norms are exact; `pairs`: the same with every latent twice;
    `negative`: no pre-activation is positive."""
    n_dead: int = 0
    reconstruction: str = "sum"

    @property
    def is_exact(self) -> bool:
        return self.kind in ("grid", "pairs")


@st.composite
def cases(draw, name: str) -> Case:
    """One to three sites; delta losses and exclusive partitions need two, some need them alike."""
    n_sites = draw(st.integers(2 if name in (*WITH_DELTA, "dfc") else 1, 3))
    widths = [draw(st.integers(1, 6)) for _ in range(n_sites)]
    if name in EQUAL_WIDTHS:
        widths = widths[:1] * n_sites
    if name in WITH_DELTA:
        widths[-1] = widths[0]
    d_sae = draw(st.integers(8, 40))
    return Case(
        name=name,
        widths=tuple(widths),
        batch=draw(st.integers(1, 12)),
        d_sae=d_sae,
        k=draw(st.sampled_from([0.75, 1, 1.5, 2, 3])),
        seed=draw(st.integers(0, 2**31)),
        kind=draw(st.sampled_from(["random", "grid", "pairs", "negative"])),
        n_dead=draw(st.one_of(st.just(0), st.just(d_sae), st.integers(1, d_sae))),
        reconstruction=draw(st.sampled_from(["sum", "mean", "norm"])),
    )


class Problem:
    """A training model and the same weights for the reference, drawn from the case's seed."""

    def __init__(self, case: Case, *, kernels: str = "auto", dtype: str = "float64") -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(case.seed)
        # Of equal dead latents AuxK takes any: where values are exact it takes them all.
        self.training = new_training(
            *case.widths,
            d_sae=case.d_sae,
            dtype=dtype,
            kernels=kernels,
            reconstruction=case.reconstruction,
            auxk=AuxK(k=case.d_sae if case.is_exact else None),
            **members(case.k, [s.name for s in sites(*case.widths)])[case.name],
        )
        self.cfg, d_sae = self.training.cfg, case.d_sae
        enc = [self.rows(self.numbers(d_sae, w)).T.contiguous() for w in case.widths]
        dec = [self.rows(self.decoder(w)) for w in case.widths]
        for p, own in self.cfg.placed_partitions():
            for m, site in enumerate(self.cfg.sites):
                enc[m][:, own] *= p.reads is None or site.name in p.reads
                dec[m][own] *= p.writes is None or site.name in p.writes
                dec[m][own] = dec[0][own] if p.tied else dec[m][own]
        self.weights = nano.Weights(
            W_enc=enc,
            b_enc=self.rows(self.numbers(d_sae)) - 100 * (case.kind == "negative"),
            W_dec=dec,
            b_dec=[self.numbers(w) for w in case.widths],
        )
        # Where values are exact theta is 1: codes stand on the edges of the window around it.
        self.log_threshold = self.numbers(d_sae) * (not case.is_exact)
        for leaf in (*enc, *dec, self.weights.b_enc, *self.weights.b_dec, self.log_threshold):
            leaf.requires_grad_()
        with torch.no_grad():
            self.training.W_enc.copy_(torch.cat(enc, dim=0))
            self.training.W_dec.copy_(torch.cat(dec, dim=1))
            self.training.b_enc.copy_(self.weights.b_enc)
            self.training.b_dec.copy_(torch.cat(self.weights.b_dec))
            for parameter in self.training._learned().values():
                parameter.copy_(self.log_threshold)

    def numbers(self, *shape: int) -> Tensor:
        if self.case.is_exact:
            return torch.randint(-4, 5, shape, generator=self.generator).double() / 4
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def decoder(self, width: int) -> Tensor:
        """Where values are exact a row has one entry, so that its norm is exact too."""
        if not self.case.is_exact:
            return self.numbers(self.case.d_sae, width)
        place = torch.randint(width, (self.case.d_sae, 1), generator=self.generator)
        size = torch.randint(1, 5, (self.case.d_sae, 1), generator=self.generator).double() / 2
        return torch.zeros(self.case.d_sae, width).double().scatter_(1, place, size)

    def rows(self, values: Tensor) -> Tensor:
        """The first of every two rows twice, where the case is of pairs."""
        is_pairs = self.case.kind == "pairs"
        return values[torch.arange(len(values)) // 2 * 2] if is_pairs else values

    def activations(self) -> list[Tensor]:
        return [self.numbers(self.case.batch, width) for width in self.case.widths]


def rounded(cfg: CrosscoderTrainingConfig, values: Tensor) -> Tensor:
    """Rounded where the config requests it, with a gradient as if it were not."""
    if cfg.compute_dtype is None:
        return values
    return values + (values.bfloat16().double() - values).detach()


def reference_losses(
    problem: Problem, x: list[Tensor], *, dead=(), step=0, coefficients=None, mean=None
) -> dict[str, Tensor]:
    """The terms of the loss; `mean` is the running mean of ||x^1 - x^0||^2 before this batch."""
    cfg, w, sparsity = problem.cfg, problem.weights, problem.cfg.sparsity
    r, coefficients = partial(rounded, cfg), coefficients or {}
    product = nano.Weights(
        W_enc=[r(W) for W in w.W_enc],
        b_enc=w.b_enc,
        W_dec=[r(W) for W in w.W_dec],
        b_dec=w.b_dec,
    )
    biases = [b * cfg.apply_b_dec_to_input for b in w.b_dec]
    u = nano.pre_activations(product, [r(x_m - b) for x_m, b in zip(x, biases, strict=True)])
    n, scale, penalty = nano.decoder_norms(w), torch.ones(cfg.d_sae), {}
    for p, own in cfg.placed_partitions():
        scale[own] = p.penalty_scale
    if isinstance(sparsity, L1):
        codes = u.relu()
        penalty = {"l1": (codes * n * scale).sum(dim=-1).mean()}
    elif isinstance(sparsity, JumpReLU):
        how = {"bandwidth": sparsity.bandwidth, "ste_to_input": sparsity.ste_to_input}
        codes = nano.jumprelu(u, problem.log_threshold.exp(), **how)
        penalty = {"tanh": (torch.tanh(sparsity.tanh_scale * codes * n) * scale).sum(-1).mean()}
    else:
        groups = [(range(own.start, own.stop), k) for own, k in cfg.selection_groups()]
        groups = [(own, min(k * sparsity.k_factor(step), len(own))) for own, k in groups]
        rule = nano.topk if isinstance(sparsity, TopK) else nano.batch_topk
        codes = nano.selected_codes(u, n, groups, rule)
    e = nano.errors(product, x, codes)
    losses = {"reconstruction": nano.reconstruction_loss(e, cfg.reconstruction)}
    if cfg.matryoshka:
        prefixes = [max(1, round(share * cfg.d_sae)) for share in cfg.matryoshka]
        nested = [nano.prefix_errors(product, x, codes, n) for n in prefixes]
        losses["matryoshka"] = sum(nano.reconstruction_loss(e, cfg.reconstruction) for e in nested)
    if cfg.delta_loss is not None:
        delta, places = cfg.delta_loss, {p.name: own for p, own in cfg.placed_partitions()}
        own = range(cfg.d_sae)[places.get(delta.partition, slice(None))]
        loss = nano.delta_loss(product, x, codes, own, with_bias=delta.with_bias)
        now = (x[-1] - x[0]).pow(2).sum(dim=-1).mean().item()
        mean = 0.99 * (now if mean is None else mean) + 0.01 * now
        losses["delta"] = delta.weight * loss / (mean if delta.scale == "relative" else 1)
    if cfg.auxk is not None and not isinstance(sparsity, L1):
        k = cfg.auxk.k or max(1, cfg.d_in // 2)
        helped = nano.selected_codes(u, n, [(dead, k)] if len(dead) else [], nano.topk)
        unit = nano.reconstruction_loss([m - m.mean(dim=0) for m in x], cfg.reconstruction)
        loss = cfg.auxk.weight * unit * nano.auxk_loss(product, e, helped)
        losses["auxk"] = loss if len(dead) else 0 * loss
    weights = {name: coefficients.get(name, sparsity.coefficient) for name in penalty}
    return losses | {name: weights[name] * value for name, value in penalty.items()}


def assert_equal(actual: Tensor, expected: Tensor, what: str, *, size: float = 0.0) -> None:
    """To 1e-6 of the size of the expected value, or of the other gradients where these are 0."""
    limit = 1e-6 * expected.norm().item() + 1e-12 * (1 + size)
    assert (actual - expected).norm().item() <= limit, f"{what}: {actual} is not {expected}"


def assert_equal_gradients(problem: Problem) -> None:  # spec: C8
    """The reference's gradients, projected: rules hold by projection, not by fewer parameters."""
    training, w = problem.training, problem.weights
    leaves = {
        "W_enc": w.W_enc,
        "W_dec": w.W_dec,
        "b_dec": w.b_dec,
        "b_enc": [w.b_enc],
        "log_threshold": [problem.log_threshold],
    }
    grads = {n: [torch.zeros_like(v) if v.grad is None else v.grad for v in own]
             for n, own in leaves.items()}  # fmt: skip
    for p, own in training.cfg.placed_partitions():
        mean = torch.stack([g[own] for g in grads["W_dec"]]).mean(dim=0) if p.tied else None
        for m, site in enumerate(training.sites):
            grads["W_enc"][m][:, own] *= p.reads is None or site.name in p.reads
            grads["W_dec"][m][own] *= p.writes is None or site.name in p.writes
            if mean is not None:
                grads["W_dec"][m][own] = mean
    size = max(g.norm().item() for own in grads.values() for g in own)
    for name, parameter in training.named_parameters():
        expected = torch.cat(grads[name], dim=-1 if name == "W_dec" else 0)
        assert_equal(parameter.grad, expected, name, size=size)


def assert_counts_as_the_matrix(codes: Codes) -> None:
    """What is told of activity is that of the matrix of codes; entries may be 0 in a JumpReLU."""
    dense = codes.to_dense().detach()
    assert codes.l0().item() == pytest.approx((dense > 0).sum().item() / len(dense))
    assert torch.equal(codes.fired(), (dense > 0).any(dim=0))
    weights = torch.arange(1.0, dense.shape[1] + 1).to(dense)
    for own in (slice(0, 5), slice(5, dense.shape[1])):
        positive = (dense * weights)[:, own][dense[:, own] > 0].tolist()
        assert codes.smallest(weights, own).item() == min(positive, default=float("inf"))


def assert_as_the_reference(
    case: Case, kernels: str, *, step: int = 3, **options
) -> CrosscoderTraining:
    problem = Problem(case, kernels=kernels)
    x, mask = problem.activations(), torch.zeros(case.d_sae, dtype=torch.bool)
    dead = torch.randperm(case.d_sae, generator=problem.generator)[: case.n_dead]
    mask[dead] = True
    expected = reference_losses(problem, x, dead=sorted(dead.tolist()), step=step, **options)
    output = problem.training.step_loss(torch.cat(x, dim=-1), is_dead=mask, step=step, **options)
    assert type(output.codes) is KERNELS[kernels]
    assert_counts_as_the_matrix(output.codes)
    assert set(output.losses) == set(expected)
    for name, loss in expected.items():
        assert_equal(output.losses[name], loss, name)
    assert_equal(output.loss, sum(expected.values()), "loss")
    sum(expected.values()).backward()
    output.loss.backward()
    assert_equal_gradients(problem)
    return problem.training


@both_steps
@every_member
@few
@given(data=st.data())
def test_loss_and_gradients_equal_the_reference(name, kernels, data):  # spec: C3 C6 C8 C9 C10 C11
    assert_as_the_reference(data.draw(cases(name)), kernels)


@both_steps
def test_the_two_whole_losses_of_the_reference(kernels):  # spec: C6 C10
    problem = Problem(Case(name="batchtopk", widths=(4, 3)), kernels=kernels)
    x = problem.activations()
    loss = problem.training.step_loss(torch.cat(x, dim=-1)).loss  # AuxK is 0: none is dead
    assert_equal(loss, nano.batchtopk_loss(problem.weights, x, 2), "BatchTopK")
    problem = Problem(Case(name="delta-masked", widths=(4, 4)), kernels=kernels)
    x, groups = problem.activations(), problem.cfg.selection_groups()
    shared, delta = ((range(own.start, own.stop), k) for own, k in groups)
    expected = nano.delta_crosscoder_loss(problem.weights, x, shared, delta, 0.5)
    assert_equal(problem.training.step_loss(torch.cat(x, dim=-1)).loss, expected, "Delta")


@both_steps
@pytest.mark.parametrize("name", ["l1", "dsf", "jumprelu", "jumprelu-ste-to-input"])
def test_penalties_take_the_weights_that_are_handed_in(name, kernels):
    case = Case(name=name, widths=(3, 3), seed=1)
    assert_as_the_reference(case, kernels, coefficients={"l1": 0.7, "tanh": 0.9})
    assert_as_the_reference(case, kernels, coefficients={"l1": 0.0, "tanh": 0.0})


@both_steps
@every_member
def test_the_terms_add_up_to_the_loss_and_stacked_input_is_flat_input(name, kernels):
    dead, losses = torch.arange(24) % 3 == 0, []
    x = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(3)).double()
    for given_x in (x, x.flatten(1)):
        training = Problem(Case(name=name, widths=(4, 4)), kernels=kernels).training
        output = training.step_loss(given_x, is_dead=dead)
        terms = [term.item() for term in output.losses.values()]
        assert output.loss.item() == pytest.approx(sum(terms), rel=1e-12)
        assert torch.equal(output.x, x.flatten(1))
        losses.append(output.loss)
    assert torch.equal(*losses)


@both_steps
def test_a_relative_delta_loss_is_divided_by_the_running_mean(kernels):  # spec: C10
    problem, mean = Problem(Case(name="delta-relative", widths=(3, 3)), kernels=kernels), None
    for scale in (1.0, 10.0, 0.1):
        x = [scale * x_m for x_m in problem.activations()]
        expected = reference_losses(problem, x, mean=mean)["delta"]
        output = problem.training.step_loss(torch.cat(x, dim=-1))
        assert_equal(output.losses["delta"], expected, f"delta at {scale}")
        now = (x[1] - x[0]).pow(2).sum(dim=-1).mean().item()
        # Begun with the first observation, and moved by a hundredth of each of the others.
        mean = now if mean is None else 0.99 * mean + 0.01 * now


@pytest.mark.parametrize("prefilter", [True, False], ids=["bounds", "float32"])
@every_member
def test_in_float32_it_is_the_same_loss_up_to_rounding(name, prefilter):
    problem = Problem(Case(name=name, widths=(6, 6), batch=12, d_sae=32), dtype="float32")
    problem.training._sparse_step.prefilter = prefilter
    # Activations that float32 holds exactly, so that nothing but the arithmetic differs.
    x = [x_m.float() for x_m in problem.activations()]
    expected = sum(reference_losses(problem, [x_m.double() for x_m in x]).values())
    output = problem.training.step_loss(torch.cat(x, dim=-1))
    assert type(output.codes) is SparseCodes
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["batchtopk", "topk", "l1", "jumprelu"])
def test_dense_codes_and_hooks_get_the_dense_step(name):
    """All latents of an untrained L1 are active half the time: more than one in 16."""
    training = Problem(Case(name=name, widths=(3, 3), k=2)).training
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double()
    assert type(training.step_loss(x).codes) is SparseCodes
    training._sparse_step.max_density = 1 / 16
    assert type(training.step_loss(x).codes) is DenseCodes  # 2 of 24 latents is one in 12.
    training._sparse_step.max_density = float("inf")
    seen = []
    training.hook_sae_acts_pre.add_hook(lambda pre, hook: seen.append((hook.name, pre.shape)))
    assert type(training.step_loss(x).codes) is DenseCodes
    assert seen == [("hook_sae_acts_pre", (8, 24))]


def test_the_calibrated_threshold_is_that_of_the_reference():  # spec: C5
    training = randomised(new_training(partitions=()))
    x = planted(200)
    weighted = training.encode_with_hidden_pre(x)[1].relu() * training.get_W_dec_norm()
    training.calibrate_threshold_([x[:70], x[70:]])
    expected = nano.threshold(weighted.detach(), 4)
    assert training.threshold.unique().item() == pytest.approx(expected, rel=1e-5)
