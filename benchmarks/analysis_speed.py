"""How fast measures and patching are, beside what they cannot do without.

    python benchmarks/analysis_speed.py

Tokens a second of encoding, of encoding with Latent Scaling (four directions and four targets of
every latent), with examples, with everything that `measure` collects, and of the same scaling done
one latent at a time, as a least squares of dense float32 tensors (on some latents, extrapolated).
Then, on the embedded pair, `measure` and `patching` beside the bare forward passes. Random weights
where 512 wide. Best of several, one process.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import (
    Crosscoder,
    ModelPair,
    Site,
    files,
    load_documents,
    measure,
    split_documents,
    tokenize,
)
from tl_crosscoder.analysis.examples import ExampleCollector
from tl_crosscoder.analysis.firing import FiringSums
from tl_crosscoder.analysis.latent_scaling import ScalingSums
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import sparse_codes
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import AddLatents, Edit, TokenFilter, unchanged
from tl_crosscoder.interventions.running import score_edits
from tl_crosscoder.models.site import site_parts

N_ROWS, N_SLOW = 4096, 16
CONTEXT = 128
SIZES = ((96, 1024, 12), (512, 16384, 32))
"""d_model of each of two sites, d_sae, mean active latents."""


def seconds(run: Callable[[], Any], *, n: int) -> float:
    """Best of n, after one to warm up."""
    run()
    best = float("inf")
    for _ in range(n):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
    return best


def random_dictionary(d_model: int, d_sae: int, l0: float, x: torch.Tensor) -> Crosscoder:
    """Thresholds at which so many latents are active on these rows."""
    sites = tuple(
        Site(name=n, d_model=d_model, hook_name="blocks.2.hook_resid_post", model_name=n)
        for n in ("base", "finetuned")
    )
    made = Crosscoder(CrosscoderConfig(d_in=2 * d_model, d_sae=d_sae, sites=sites))
    W_enc = torch.randn(2 * d_model, d_sae) / (2 * d_model) ** 0.5
    pre = (x[:256].flatten(1) @ W_enc).flatten()
    threshold = pre.topk(int(l0 * 256)).values[-1].item()
    weights = made.state_dict() | {
        "W_enc": W_enc,
        "W_dec": torch.randn(d_sae, 2 * d_model) / (2 * d_model) ** 0.5,
        "threshold": torch.full((d_sae,), threshold),
    }
    made.load_state_dict(weights)
    return made


@torch.no_grad()
def one_latent_at_a_time(crosscoder: Crosscoder, x: torch.Tensor, n_latents: int) -> None:
    """Betas of four targets and two sites by dense least squares, latent by latent."""
    codes = crosscoder.encode(x)
    x_hat = crosscoder.decode(codes).view_as(x)
    d_all = crosscoder.decoder(1)
    for j in range(n_latents):
        f, d = codes[:, j], d_all[j]
        divisor = f.square().sum() * d.square().sum()
        for site in range(2):
            own = f[:, None] * crosscoder.decoder(site)[j]
            error = x[:, site] - x_hat[:, site] + own
            bias = crosscoder.decoder_bias(site)
            for Y in (error, x_hat[:, site], x[:, site], x[:, site] - bias):
                _ = (f @ (Y @ d)) / divisor


def on_rows(d_model: int, d_sae: int, l0: int) -> dict[str, Any]:
    """Speed on activations that are in memory."""
    torch.manual_seed(0)
    x = torch.randn(N_ROWS, 2, d_model)
    crosscoder = random_dictionary(d_model, d_sae, l0, x)
    text = plain_text(N_ROWS)
    positions = torch.arange(N_ROWS)

    def scaling(controls: tuple[str, ...]) -> Callable[[], None]:
        sums = ScalingSums(crosscoder, pair=(0, 1), controls=controls)
        return lambda: sums.add(site_parts(x, crosscoder.sites), sparse_codes(crosscoder, x))

    def examples() -> None:
        collector = ExampleCollector(d_sae, context_size=CONTEXT)
        collector.add(sparse_codes(crosscoder, x), positions)

    def firing() -> None:
        sums = FiringSums(n_sources=1, d_sae=d_sae, device=x.device)
        sums.add(sparse_codes(crosscoder, x), text)

    n = 3 if d_sae > 4096 else 10
    with torch.no_grad():
        times = {
            "encode": seconds(lambda: crosscoder.encode(x), n=n),
            "encode + Latent Scaling": seconds(scaling(()), n=n),
            "encode + Latent Scaling + controls": seconds(scaling(("random", "other")), n=n),
            "encode + examples": seconds(examples, n=n),
            "encode + firing": seconds(firing, n=n),
        }
    slow = seconds(lambda: one_latent_at_a_time(crosscoder, x, N_SLOW), n=1) - times["encode"]
    times["one latent at a time"] = slow * d_sae / N_SLOW
    return {
        "d_model": d_model,
        "d_sae": d_sae,
        "l0": len(sparse_codes(crosscoder, x).values) / N_ROWS,
        "tokens_per_second": {k: round(N_ROWS / v) for k, v in times.items()},
        "of_encode": {k: round(v / times["encode"], 2) for k, v in times.items()},
    }


def plain_text(n_tokens: int) -> TokenizedText:
    """Plain text of so many tokens that count."""
    shape = (n_tokens // CONTEXT, CONTEXT)
    zeros = torch.zeros(shape, dtype=torch.uint8)
    return TokenizedText(
        tokens=torch.zeros(shape, dtype=torch.int32),
        dropped=zeros,
        source_ids=zeros,
        role_ids=zeros,
        sources=("text",),
        context_ids=torch.arange(shape[0]),
    )


def on_the_embedded_pair(n_contexts: int) -> dict[str, Any]:
    """With the models: `measure`, and patching of one and of eight variants."""
    pair = ModelPair.from_pretrained(
        "tl_crosscoder/world-base",
        adapter="tl_crosscoder/taboo",
        hook_name="blocks.2.hook_resid_post",
    )
    documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=3000))[1]
    text = tokenize(documents, pair.tokenizer, context_size=CONTEXT)[:n_contexts]
    sample = pair.activations(text.tokens[:16])[text.mask[:16]]
    crosscoder = random_dictionary(96, 1024, 12, sample)
    crosscoder.rename_models_(pair.sites)
    ctx = InterventionContext.of(pair, crosscoder)
    ids = torch.arange(64)
    edits: list[Edit] = [
        AddLatents(site=1, stream=0, latents=ids + i, directions=ctx.difference[ids + i])
        for i in range(8)
    ]

    def bare(n: int) -> None:
        for part in text.tokens.split(32):
            pair.activations(part)
            for _ in range(n):
                pair.logits(part)

    def patched(n: int) -> None:
        score_edits(
            ctx,
            text,
            edits[:n],
            reference=unchanged(1),
            kinds={"all": TokenFilter()},
            batch_size=32,
        )

    n_tokens = text.tokens.numel()
    times = {
        "bare passes to the hook": seconds(lambda: bare(0), n=3),
        "measure": seconds(lambda: measure(pair, crosscoder, text), n=3),
        "bare passes to the hook, and one to the end": seconds(lambda: bare(1), n=3),
        "patching, one variant": seconds(lambda: patched(1), n=3),
        "bare passes to the hook, and eight to the end": seconds(lambda: bare(8), n=3),
        "patching, eight variants": seconds(lambda: patched(8), n=3),
    }
    return {
        "n_tokens": n_tokens,
        "tokens_per_second": {k: round(n_tokens / v) for k, v in times.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/analysis_speed.json"
    )
    parser.add_argument("--quick", action="store_true", help="the small size; keeps nothing")
    arguments = parser.parse_args()
    rows = [on_rows(*size) for size in (SIZES[:1] if arguments.quick else SIZES)]
    embedded = on_the_embedded_pair(16 if arguments.quick else 128)
    for row in rows:
        print(f"2 x {row['d_model']} -> {row['d_sae']:,}, L0 {row['l0']:.1f}")
        for name, rate in row["tokens_per_second"].items():
            print(f"  {name:<38} {rate:>9,} tokens/s   {row['of_encode'][name]:>8.2f} of encoding")
    print(f"embedded pair, {embedded['n_tokens']:,} tokens")
    for name, rate in embedded["tokens_per_second"].items():
        print(f"  {name:<46} {rate:>9,} tokens/s")
    if not arguments.quick:
        content = {"n_threads": torch.get_num_threads(), "rows": rows, "embedded": embedded}
        files.write_json(arguments.output, content)


if __name__ == "__main__":
    main()
