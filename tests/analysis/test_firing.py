import math

import pytest
import torch

from tl_crosscoder.analysis.firing import POSITIONS, Firing, FiringSums
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import TokenizedText

D_SAE = 5


@pytest.fixture(scope="module")
def text() -> TokenizedText:
    """Random sources, roles and drops; positions reach beyond the last bin."""
    generator = torch.Generator().manual_seed(0)
    shape = (12, 300)

    def random(n: int) -> torch.Tensor:
        return torch.randint(n, shape, generator=generator).to(torch.uint8)

    return TokenizedText(
        tokens=torch.zeros(shape, dtype=torch.int32),
        dropped=random(3),
        source_ids=random(2),
        role_ids=random(len(ROLES)),
        sources=("one", "other", "none"),
        context_ids=torch.arange(shape[0]),
    )


@pytest.fixture(scope="module")
def dense(text) -> torch.Tensor:
    """Codes of the kept tokens, in whole quarters; latent 2 never fires."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-6, 6, (text.n_tokens, D_SAE), generator=generator).clamp(min=0) / 4
    codes[:, 2] = 0
    return codes


def of_batches(text, dense, size: int) -> Firing:
    sums = FiringSums(n_sources=3, d_sae=D_SAE, device=torch.device("cpu"))
    start = 0
    for first in range(0, len(text), size):
        part = text[first : first + size]
        sums.add(SparseCodes.of_dense(dense[start : start + part.n_tokens]), part)
        start += part.n_tokens
    return sums.result(text.sources)


def bin_of(position: int) -> str:
    """The name of the bin that a position is in."""
    for name in POSITIONS:
        low, _, high = name.partition("-")
        if int(low) <= position and (not high or position <= int(high)):
            return name
    raise AssertionError(position)


@pytest.mark.parametrize("batch_size", [1, 5, 12])
def test_counts_are_those_of_a_loop_over_tokens(text, dense, batch_size):
    firing = of_batches(text, dense, batch_size)
    by = {
        "source": torch.zeros(3, D_SAE),
        "role": torch.zeros(len(ROLES), D_SAE),
        "position": torch.zeros(len(POSITIONS), D_SAE),
    }
    seen = {name: [0] * len(counts) for name, counts in by.items()}
    total, largest = [0.0] * D_SAE, [0.0] * D_SAE
    row = 0
    for context in range(len(text)):
        for position in range(text.context_size):
            if text.dropped[context, position]:
                continue
            places = {
                "source": int(text.source_ids[context, position]),
                "role": int(text.role_ids[context, position]),
                "position": POSITIONS.index(bin_of(position)),
            }
            for name, place in places.items():
                seen[name][place] += 1
            for latent, code in enumerate(dense[row].tolist()):
                total[latent] += code
                largest[latent] = max(largest[latent], code)
                for name, place in places.items():
                    by[name][place, latent] += code > 0
            row += 1
    assert firing.n_tokens == row == text.n_tokens
    for name, counts in by.items():
        assert torch.equal(getattr(firing, f"n_active_by_{name}"), counts.double())
        assert list(getattr(firing, f"tokens_by_{name}")) == seen[name]
        assert torch.equal(counts.sum(dim=0).double(), firing.n_active)
    assert firing.sum_of_codes.tolist() == total  # quarters add up exactly
    assert firing.max_code.tolist() == largest
    assert min(seen["position"]) > 0


def test_shares_by_hand():
    """Four tokens: template, user, template, user, with codes 1, 0, 3, 2 of latent 0.

    It fires on 3 of 4, on two template tokens of three: mean code 6 / 3 = 2. It fires on both
    template tokens and one of two user tokens. Latent 1 never fires, and no one is a tool.
    """
    roles = torch.tensor([[5, 2, 5, 2]], dtype=torch.uint8)
    zeros = torch.zeros_like(roles)
    text = TokenizedText(
        tokens=zeros.int(), dropped=zeros, source_ids=zeros, role_ids=roles, sources=("chats",),
        context_ids=torch.zeros(1, dtype=torch.long),
    )  # fmt: skip
    sums = FiringSums(n_sources=1, d_sae=2, device=torch.device("cpu"))
    codes = torch.tensor([[1.0, 0], [0, 0], [3, 0], [2, 0]])
    sums.add(SparseCodes.of_dense(codes), text)
    found = sums.result(text.sources)
    assert found.rate.tolist() == [0.75, 0.0]
    assert found.mean_code[0] == 2.0
    assert found.template_share[0] == pytest.approx(2 / 3)
    assert found.max_code.tolist() == [3.0, 0.0]
    assert found.rate_by_role("template").tolist() == [1.0, 0.0]
    assert found.rate_by_role("user").tolist() == [0.5, 0.0]
    for undefined in (found.mean_code[1], found.template_share[1], *found.rate_by_role("tool")):
        assert math.isnan(undefined)
    with pytest.raises(ValueError, match=r"role 'robot' is not known; they are \['text'"):
        found.rate_by_role("robot")
