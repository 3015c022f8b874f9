"""A diff-SAE goes through the same edits as a crosscoder: nothing is added for it."""

import pytest
import torch

from tl_crosscoder import Crosscoder, CrosscoderConfig
from tl_crosscoder.interventions.context import Subject
from tl_crosscoder.interventions.edits import Remainder, Shift


@pytest.fixture
def diff_sae(pair):
    source = pair.difference()
    made = Crosscoder(CrosscoderConfig(d_in=source.d_model, d_sae=8, sites=source.sites))
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(t.shape, generator=generator) for n, t in made.state_dict().items()}
    weights["threshold"] = weights["threshold"].abs()
    made.load_state_dict(weights)
    return source, made


def test_edits_of_a_diff_sae_by_its_formulas(pair, unpacked, diff_sae):
    subject = Subject.of(*diff_sae)
    site, sae = subject.finetuned, diff_sae[1]
    (streams,) = subject.batches(unpacked[:3])
    x0, x1 = streams.x
    codes = sae.encode(x1 - x0).detach() * streams.counted[..., None]
    assert (codes > 0).float().mean() > 0.1
    chosen = torch.tensor([5, 2])
    ablated = Shift(
        site=site, stream=site, latents=chosen, directions=subject.difference[chosen], sign=-1.0
    )
    expected = x1 - codes[..., chosen] @ sae.W_dec.detach()[chosen]
    torch.testing.assert_close(ablated(streams), expected, rtol=1e-4, atol=1e-4)

    every = torch.arange(8)
    all_latents = Shift(
        site=site, stream=subject.base, latents=every, directions=subject.difference
    )
    remainder = Remainder(site=site, subject=subject)
    # x0 + said + (x1 - said) - x0.
    whole = all_latents(streams) + remainder(streams) - x0
    torch.testing.assert_close(whole, x1, rtol=1e-4, atol=1e-4)
    assert (remainder(streams) - x1).abs().max() > 0.1
