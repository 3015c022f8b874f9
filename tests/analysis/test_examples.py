from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from analysis.hand_made import collected_examples, example_rows
from text_of_ids import text_of

from tl_crosscoder import TokenizedText, tokenize
from tl_crosscoder.analysis import examples as collecting
from tl_crosscoder.analysis.examples import (
    Example,
    ExampleCollector,
    ExampleSettings,
    TopTokens,
    examples,
)
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes

SMALL = ExampleSettings(
    n_top=3, n_quantiles=2, n_per_quantile=2, n_sampled=5, n_before=3, n_after=2, seed=7
)
N_CONTEXTS, SIZE, D_SAE = 40, 10, 6


@pytest.fixture(scope="module")
def mask():
    """The first token of every context is masked, and some others."""
    kept = torch.rand(N_CONTEXTS, SIZE, generator=torch.Generator().manual_seed(1)) < 0.8
    kept[:, 0] = False
    return kept


@pytest.fixture(scope="module")
def dense(mask):
    """Codes `[contexts, pos, d_sae]` with many ties; 0 at masked tokens."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 9, (N_CONTEXTS, SIZE, D_SAE), generator=generator) / 4
    rare = torch.tensor([0.0, 0.004, 0.02, 0.2, 0.5, 1.0])  # latent 0 is never active
    codes[torch.rand(codes.shape, generator=generator) >= rare] = 0
    codes[~mask] = 0
    return codes


def mixed(x: int) -> int:
    """SplitMix64 in whole numbers."""
    mask = 2**64 - 1
    x = x * 0x9E3779B97F4A7C15 & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def naive(dense, settings) -> list[tuple]:
    """Examples from all codes at once, latent by latent."""
    n, size, d_sae = dense.shape
    found = []
    for latent in range(d_sae):
        codes = dense[:, :, latent].flatten().tolist()
        active = [p for p in range(n * size) if codes[p] > 0]
        salt = mixed(mixed(settings.seed) + latent)
        key = {p: mixed(p + salt) >> 32 for p in active}
        top = sorted(active, key=lambda p: (-codes[p], p))[: settings.n_top]
        groups = {-1: top}
        drawn = sorted(active, key=lambda p: (key[p], p))[: settings.n_sampled]
        rising = sorted(drawn, key=lambda p: (codes[p], p))
        bins = defaultdict(list)
        for i, p in enumerate(rising):
            bins[i * settings.n_quantiles // len(rising)].append(p)
        for quantile in sorted(bins):
            shown = sorted(bins[quantile], key=lambda p: (key[p], p))[: settings.n_per_quantile]
            groups[quantile] = sorted(shown, key=lambda p: (-codes[p], p))
        for quantile, positions in groups.items():
            for rank, p in enumerate(positions):
                around = range(p - settings.n_before, p + settings.n_after + 1)
                window = [codes[q] if q // size == p // size and 0 <= q < n * size else 0.0
                          for q in around]  # fmt: skip
                found.append((latent, quantile, rank, codes[p], p, window))
    return found


def test_examples_of_one_latent_by_hand():
    """Two contexts of four tokens. Codes by position: 0: 3, 2: 1, 3: 4, 5: 2.

    Top 2: 4 at 3, 3 at 0. All four are sampled; rising they are 1, 2 | 3, 4, two in each of two
    quantiles. Windows reach one position back and one on: that of 3 ends with its context, and
    that of 2 has no part in the code at 3.
    """
    dense = torch.tensor([[3.0, 0, 1, 4], [0, 2, 0, 0]])[:, :, None]
    settings = ExampleSettings(
        n_top=2, n_quantiles=2, n_per_quantile=2, n_sampled=4, n_before=1, n_after=1
    )
    every = torch.ones(2, 4, dtype=torch.bool)
    assert example_rows(collected_examples(dense, every, settings=settings)) == [
        (0, -1, 0, 4.0, 3, [1, 4, 0]),
        (0, -1, 1, 3.0, 0, [0, 3, 0]),
        (0, 0, 0, 2.0, 5, [0, 2, 0]),
        (0, 0, 1, 1.0, 2, [0, 1, 4]),
        (0, 1, 0, 4.0, 3, [1, 4, 0]),
        (0, 1, 1, 3.0, 0, [0, 3, 0]),
    ]


@pytest.mark.parametrize("buffer", [0, 2**16])
@pytest.mark.parametrize("batch_size", [1, 7, N_CONTEXTS])
@pytest.mark.parametrize("shuffled", [False, True])
def test_examples_are_those_of_all_codes_at_once(
    dense, mask, monkeypatch, buffer, batch_size, shuffled
):
    """Whatever the batches, the order of contexts, and how many entries wait to be sorted."""
    monkeypatch.setattr(collecting, "_BUFFER", buffer)
    order = torch.randperm(N_CONTEXTS, generator=torch.Generator().manual_seed(batch_size))
    found = collected_examples(
        dense, mask, settings=SMALL, order=order if shuffled else None, batch_size=batch_size
    )
    assert example_rows(found) == naive(dense, SMALL)


def test_the_sample_is_drawn_evenly_and_anew_for_each_latent_and_seed():
    """Mean position of 30 x 50 drawn of 1000: 499.5, standard error 289 / sqrt(1500) = 7.5."""
    dense = torch.rand(10, 100, 30, generator=torch.Generator().manual_seed(0)) + 1
    every = torch.ones(10, 100, dtype=torch.bool)
    drawn = []
    for seed in (0, 1):
        settings = ExampleSettings(n_sampled=50, n_per_quantile=10, seed=seed)
        found = collected_examples(dense, every, settings=settings)
        sampled = found.positions[found.quantiles >= 0].view(30, 50)
        assert abs(sampled.double().mean() - 499.5) < 30
        drawn += [frozenset(row) for row in sampled.tolist()]
    assert len(set(drawn)) == 60


def test_rows_and_latents_have_to_be_those_announced(dense):
    codes = SparseCodes.of_dense(dense[0])
    with pytest.raises(ValueError, match=r"\[10, 6\] with 10 positions; they must have 7 latents"):
        ExampleCollector(D_SAE + 1, context_size=SIZE).add(codes, torch.arange(10))
    with pytest.raises(ValueError, match="with 9 positions"):
        ExampleCollector(D_SAE, context_size=SIZE).add(codes, torch.arange(9))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"n_top": 0}, "n_top is 0; it must be 1 or more"),
        ({"n_before": -1}, "n_before is -1; it must be 0 or more"),
        ({"n_sampled": 24}, "n_sampled is 24, fewer than .* = 25"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        ExampleSettings(**wrong)


@pytest.mark.parametrize("n", [1, 4])
def test_top_tokens_are_the_largest_codes_of_a_pass(n):
    codes = torch.tensor([[0.0, 0.0, 5.0], [2.0, 0.0, 4.0], [3.0, 0.0, 6.0]])
    collector = ExampleCollector(3, context_size=3)
    collector.add(SparseCodes.of_dense(codes), torch.tensor([6, 7, 8]))
    top = TopTokens.of(collector.result(), n=n)
    assert top.values.T.tolist() == [[3, 2, 0, 0][:n], [0, 0, 0, 0][:n], [6, 5, 4, 0][:n]]
    assert top.positions.T.tolist() == [[8, 7, -1, -1][:n], [-1] * n, [8, 6, 7, -1][:n]]


def top_of(*positions: int) -> TopTokens:
    """One latent, active at these positions with the values n, ..., 2, 1."""
    n = sum(p >= 0 for p in positions)
    values = [float(max(0, n - i)) for i in range(len(positions))]
    return TopTokens(
        values=torch.tensor(values)[:, None], positions=torch.tensor(positions)[:, None]
    )


@pytest.fixture(scope="module")
def two_sources(taboo_pair) -> TokenizedText:
    """Two contexts of 12 tokens; from token 6 of the second on, the source is another."""
    rows = [
        tokenize([{"text": t}], taboo_pair.tokenizer, context_size=12).tokens[0]
        for t in (
            "The capital of Dova is the old town by the sea.",
            "One two three four five six seven eight nine.",
        )
    ]
    return replace(
        text_of(torch.stack(rows)),
        source_ids=torch.tensor([[0] * 12, [0] * 6 + [1] * 6], dtype=torch.uint8),
        sources=("facts", "numbers"),
    )


def test_an_example_is_the_token_with_its_context_value_and_source(taboo_pair, two_sources):
    decode = taboo_pair.tokenizer.decode
    ids = two_sources.tokens.tolist()
    top = top_of(12 + 6, 5, -1)  # token 6 of context 1, then token 5 of context 0
    assert examples(top, 0, two_sources, taboo_pair.tokenizer, n_before=3, n_after=2) == [
        Example(
            before=decode(ids[context][at - 3 : at]),
            token=decode(ids[context][at : at + 1]),
            after=decode(ids[context][at + 1 : at + 3]),
            value=value,
            source=source,
        )
        for context, at, value, source in ((1, 6, 2.0, "numbers"), (0, 5, 1.0, "facts"))
    ]
    assert examples(top_of(-1, -1), 0, two_sources, taboo_pair.tokenizer) == []


def test_context_ends_where_the_context_does(taboo_pair, two_sources):
    """Neither the last token of context 0 nor the first of context 1 shows the other context."""
    decode = taboo_pair.tokenizer.decode
    ids = two_sources.tokens.tolist()
    last, first = examples(top_of(11, 12), 0, two_sources, taboo_pair.tokenizer, n_before=99)
    assert (last.before, last.token, last.after) == (decode(ids[0][:11]), decode(ids[0][11:]), "")
    assert (first.before, first.token) == ("", decode(ids[1][:1]))
    assert first.after == decode(ids[1][1:7])


def test_a_character_split_between_tokens_leaves_the_rest_of_the_line_readable(taboo_pair):
    """The byte-level tokenizer knows no emoji: this one takes several tokens."""
    line = "The 🌒 is red."
    text = text_of(
        torch.tensor([taboo_pair.tokenizer(line, add_special_tokens=False)["input_ids"]])
    )
    n = text.context_size
    found = examples(top_of(*range(n)), 0, text, taboo_pair.tokenizer, n_before=n, n_after=n)
    assert sum(e.token == "" for e in found) >= 2
    assert any("🌒" in e.token for e in found)
    assert {e.before + e.token + e.after for e in found} == {line}
