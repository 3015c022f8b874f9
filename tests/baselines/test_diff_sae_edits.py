"""A diff-SAE goes through the same edits as a crosscoder: nothing is added for it."""

import pytest
import torch

from tl_crosscoder import Crosscoder, CrosscoderConfig
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import AddLatents, ErrorAndBias


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
    ctx = InterventionContext.of(*diff_sae)
    site, sae = ctx.finetuned, diff_sae[1]
    (acts,) = ctx.batches(unpacked[:3])
    x0, x1 = acts.x
    codes = sae.encode(x1 - x0).detach() * acts.counted[..., None]
    assert (codes > 0).float().mean() > 0.1
    chosen = torch.tensor([5, 2])
    ablated = AddLatents(
        site=site, stream=site, latents=chosen, directions=ctx.difference[chosen], sign=-1.0
    )
    expected = x1 - codes[..., chosen] @ sae.W_dec.detach()[chosen]
    torch.testing.assert_close(ablated(acts), expected, rtol=1e-4, atol=1e-4)

    every = torch.arange(8)
    all_latents = AddLatents(site=site, stream=ctx.base, latents=every, directions=ctx.difference)
    remainder = ErrorAndBias(site=site, ctx=ctx)
    # x0 + said + (x1 - said) - x0.
    whole = all_latents(acts) + remainder(acts) - x0
    torch.testing.assert_close(whole, x1, rtol=1e-4, atol=1e-4)
    assert (remainder(acts) - x1).abs().max() > 0.1
