"""Partitions: where they lie, what is refused, and that their rules hold for good."""

import pytest
import torch
from dictionaries import (
    BOTH,
    D_MODEL,
    D_SAE,
    MEMBERS,
    members,
    new_training,
    planted,
    randomised,
    sites,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tl_crosscoder import L1, BatchTopK, CrosscoderTraining, TopK
from tl_crosscoder.crosscoder.config import CrosscoderTrainingConfig, DeltaLoss
from tl_crosscoder.crosscoder.partition import (
    Partition,
    placed,
    project_decoder_,
    project_encoder_,
)


def shares(*values: float, **fields) -> tuple[Partition, ...]:
    return tuple(Partition(name=f"p{i}", share=v, **fields) for i, v in enumerate(values))


def stops(partitions: tuple[Partition, ...], d_sae: int) -> list[int]:
    return [latents.stop for _, latents in placed(partitions, d_sae)]


def test_ranges_by_hand():
    # 0.05 and 0.1 of 40 end at 2 and at 6; 0.05 of 41 is 2.05 and 0.15 of 41 is 6.15: the same.
    assert stops(shares(0.05, 0.1, 0.85), 40) == [2, 6, 40]
    assert stops(shares(0.05, 0.1, 0.85), 41) == [2, 6, 41]
    # Thirds of 32: 10.67 and 21.33. They are 11, 10 and 11 latents.
    assert stops(shares(1 / 3, 1 / 3, 1 / 3), 32) == [11, 21, 32]
    # Ten tenths add up to 0.9999999999999999; the last part still ends at the last latent.
    assert stops(shares(*[0.1] * 10), 1000) == [*range(100, 1001, 100)]


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=6), d_sae=st.integers(200, 100_000)
)
def test_ranges_cover_all_latents_once_and_no_share_is_off_by_more_than_one(weights, d_sae):
    parts = shares(*[w / sum(weights) for w in weights])
    found = placed(parts, d_sae)
    edges = [0, *(latents.stop for _, latents in found)]
    assert [latents.start for _, latents in found] == edges[:-1]
    assert edges[-1] == d_sae
    assert all(
        abs(b - a - p.share * d_sae) <= 1 for p, a, b in zip(parts, edges, edges[1:], strict=False)
    )


def test_selection_groups_by_hand():
    own = (
        Partition(name="a", share=0.25, k=3),
        Partition(name="b", share=0.25),
        Partition(name="c", share=0.5),
    )
    # b and c share the k of the sparsity; without partitions all latents do.
    groups, places = BatchTopK(k=5).groups, placed(own, 40)
    assert groups(places, 40) == [(slice(0, 10), 3), (slice(10, 40), 5)]
    swapped = placed(own[1:2] + own[:1] + own[2:], 40)[:2]
    assert groups(swapped, 40) == [(slice(0, 10), 5), (slice(10, 20), 3)]
    assert groups((), 40) == [(slice(0, 40), 5)]
    assert groups(places[:1], 40) == [(slice(0, 10), 3)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Partition(name="a", share=0), "share is 0; it must be above 0"),
        (lambda: Partition(name="a", share=1, k=0), "k is 0; it must be above 0"),
        (
            lambda: Partition(name="a", share=1, penalty_scale=-1),
            "penalty_scale is -1; it must be 0 or",
        ),
        (lambda: Partition(name="a", share=1, tied=True, writes=("base",)), "leave `writes` out"),
        (lambda: placed(shares(0.5, 0.4), 40), r"\('p1', 0.4\)\] add up to 0.9; they must"),
        (lambda: placed((Partition(name="a", share=0.5),) * 2, 40), "names must differ"),
        (lambda: placed(shares(0.01, 0.99), 10), "'p0' has a share of 0.01 of 10 latents, which"),
        (lambda: placed(shares(0.1, 0.9, k=2), 10), "'p0' has k = 2, but only 1 latents"),
    ],
)
def test_partitions_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


A, B = Partition(name="a", share=0.5), Partition(name="b", share=0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"partitions": (Partition(name="a", share=1, reads=("other",)),)},
            r"\['other'\]; there are",
        ),
        (
            {"partitions": (Partition(name="a", share=1, reads=()),)},
            "reads or writes no site at all",
        ),
        (
            {"partitions": (Partition(name="a", share=1, writes=()),)},
            "reads or writes no site at all",
        ),
        (
            {"partitions": (Partition(name="a", share=1, tied=True),), "sites": sites(10, 14)},
            r"different widths: \[\('base', 10\), \('finetuned', 14\)\]",
        ),
        (
            {"partitions": (Partition(name="a", share=1, k=2),), "sparsity": L1()},
            "l1 selects nothing",
        ),
        (
            {"partitions": (Partition(name="a", share=1, k=1.5),), "sparsity": TopK(k=2)},
            "whole numbers",
        ),
        ({"partitions": (A, B), "sparsity": BatchTopK(k=33)}, "has only 32"),
        (
            {
                "partitions": (
                    A,
                    Partition(name="c", share=0.25, k=1),
                    Partition(name="b", share=0.25),
                )
            },
            "must lie side by side",
        ),
        (
            {"partitions": (A, B), "delta_loss": DeltaLoss()},
            r"'delta', but the partitions are \['a', 'b'\]",
        ),
        (
            {"delta_loss": DeltaLoss(partition=None), "sites": sites(24)},
            "needs two sites of one width",
        ),
        (
            {"delta_loss": DeltaLoss(partition=None), "sites": sites(10, 14)},
            r"one width; the sites are \[\('base', 10\)",
        ),
        ({"matryoshka": (0.5, 0.2)}, "rise and lie between 0 and 1"),
        ({"matryoshka": (0.5, 1.0)}, "rise and lie between 0 and 1"),
        ({"kernels": "fast"}, "kernels is 'fast'"),
        ({"reconstruction": "l2"}, "reconstruction is 'l2'"),
    ],
)
def test_configs_whose_partitions_and_terms_do_not_fit_are_refused(fields, message):
    default = {"d_in": 24, "d_sae": 32, "sites": sites(12, 12), "sparsity": BatchTopK(k=2)}
    with pytest.raises(ValueError, match=message):
        CrosscoderTrainingConfig(**(default | fields))


def test_projections_by_hand():  # spec: C8
    parts = placed(
        (
            Partition(name="tied", share=0.5, tied=True),
            Partition(name="base", share=0.5, reads=("base",), writes=("base",)),
        ),
        2,
    )
    W_dec = torch.tensor([[1.0, 2.0, 3.0, 6.0], [5.0, 6.0, 7.0, 8.0]])
    project_decoder_(W_dec, parts, sites(2, 2))
    # The mean of [1, 2] and [3, 6], twice; what the second would write to the second site is gone.
    assert W_dec.tolist() == [[2, 4, 2, 4], [5, 6, 0, 0]]
    W_enc = torch.ones(4, 2)
    project_encoder_(W_enc, parts, sites(2, 2))
    assert W_enc.T.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def exclusive(first: str, last: str) -> tuple[Partition, ...]:
    return (
        Partition(name="tied", share=0.25, tied=True),
        Partition(name="first", share=0.25, reads=(first,), writes=(first,)),
        Partition(name="last", share=0.25, writes=(last,)),
        Partition(name="free", share=0.25),
    )


def forbidden(training: CrosscoderTraining, name: str) -> Tensor:
    """Entries of a parameter that the partitions `first` and `last` above silence."""
    mask = torch.zeros(D_SAE, 2, D_MODEL, dtype=torch.bool)
    mask[8:16, 1] = True
    if name == "W_dec":
        mask[16:24, 0] = True
    return mask.flatten(1) if name == "W_dec" else mask.flatten(1).T


@pytest.mark.parametrize("kernels", ["auto", "dense"])
@pytest.mark.parametrize("n_backwards", [1, 2])
def test_rules_hold_in_values_gradients_and_moments(kernels, n_backwards):  # spec: C8
    """AuxK is on, so that dead latents of every partition have gradients too."""
    training = new_training(partitions=exclusive(*BOTH), kernels=kernels)
    optimizer = torch.optim.Adam(training.parameters(), lr=1e-2)
    start = training.W_dec.detach().clone()
    for step in range(30):
        optimizer.zero_grad()
        for half in range(n_backwards):
            x = planted(32, seed=step + half)
            training.step_loss(x, is_dead=torch.arange(D_SAE) % 2 == 0).loss.backward()
        optimizer.step()
        assert_rules_hold(training, optimizer)
    # Every row has moved.
    assert ((training.W_dec - start).abs().amax(dim=-1) > 1e-3).all()


def assert_rules_hold(training: CrosscoderTraining, optimizer: torch.optim.Optimizer) -> None:
    for name in ("W_enc", "W_dec"):
        parameter = getattr(training, name)
        moments = optimizer.state[parameter]
        for tensor in (parameter, parameter.grad, moments["exp_avg"], moments["exp_avg_sq"]):
            assert tensor[forbidden(training, name)].count_nonzero() == 0
            if name == "W_dec":
                assert torch.equal(tensor[:8, :D_MODEL], tensor[:8, D_MODEL:])
    assert not torch.equal(training.decoder(0)[24:], training.decoder(1)[24:])


def test_the_gradient_of_two_backwards_is_the_sum_of_the_two():
    batches, grads = [planted(16, seed=s) for s in (0, 1)], []
    for own in ([batches[0]], [batches[1]], batches):
        training = randomised(new_training(partitions=exclusive(*BOTH), dtype="float64", auxk=None))
        for x in own:
            training.step_loss(x.double()).loss.backward()
        grads.append(training.W_dec.grad)
    torch.testing.assert_close(grads[0] + grads[1], grads[2])


def test_weights_obey_from_the_start_and_n_j_counts_written_sites_alone():  # spec: C2
    training = new_training(partitions=exclusive(*BOTH))
    # Rows of norm 1 at each site: tied and free latents write to two, the others to one.
    expected = torch.tensor([2.0, 1.0, 1.0, 2.0]).repeat_interleave(8)
    torch.testing.assert_close(training.get_W_dec_norm().detach(), expected)


def made(name: str, kernels: str, *, names: tuple[str, str] = BOTH) -> CrosscoderTraining:
    return new_training(dtype="float64", kernels=kernels, **members(2, names)[name])


def obeying(name: str, kernels: str) -> CrosscoderTraining:
    """Weights as after training, within the rules."""
    training = randomised(made(name, kernels))
    rules = training.cfg.placed_partitions()
    project_decoder_(training.W_dec.data, rules, training.sites)
    project_encoder_(training.W_enc.data, rules, training.sites)
    return training


def by_site(name: str, values: Tensor) -> Tensor:
    """A parameter with its two sites swapped."""
    axis = {"W_enc": 0, "W_dec": 1, "b_dec": 0}.get(name)
    if axis is None:
        return values
    base, finetuned = values.split(D_MODEL, dim=axis)
    return torch.cat([finetuned, base], dim=axis)


@pytest.mark.parametrize("kernels", ["auto", "dense"])
@pytest.mark.parametrize("name", MEMBERS)
def test_swapping_sites_and_their_names_mirrors(name, kernels):  # spec: C13
    """The same loss and codes, and gradients that are swapped as the weights were.

    The partitions keep their places: the base's own becomes the fine-tune's own.
    """
    training, swapped = obeying(name, kernels), made(name, kernels, names=BOTH[::-1])
    with torch.no_grad():
        for parameter, own in swapped.named_parameters():
            own.copy_(by_site(parameter, training.get_parameter(parameter)))
    x = planted(16).double()
    steps = [swapped.step_loss(x.flip(1)), training.step_loss(x)]
    torch.testing.assert_close(*(step.codes.to_dense() for step in steps))
    torch.testing.assert_close(*(step.loss for step in steps))
    sum(step.loss for step in steps).backward()
    for parameter, own in swapped.named_parameters():
        expected = by_site(parameter, training.get_parameter(parameter).grad)
        torch.testing.assert_close(own.grad, expected, msg=lambda m, n=parameter: f"{n}: {m}")
