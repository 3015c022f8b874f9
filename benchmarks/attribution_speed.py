"""What attribution of all latents costs, beside the passes that it cannot do without.

    python benchmarks/attribution_speed.py

On the embedded taboo pair and its dictionary, by number of steps n, best of several in one process:
n forward and backward passes of the fine-tuned model from the hook to the KL, whose gradient is
taken and thrown away; `attribution`, which adds both models to their hooks, the two ends of the
way, encoding, and the sums of every latent, role and context; and the part of it that is spent on
both models up to their hooks, as any measure of a pair. Limit: one tiny pair, on the CPU.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import Crosscoder, ModelPair, files, load_documents, split_documents, tokenize
from tl_crosscoder.config.causal import AttributionSettings
from tl_crosscoder.data.harvest import batches_of
from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.running import kl_divergence, log_probs_at, predicted
from tl_crosscoder.models.forward import activation_gradients, continued, differentiable

HOOK = "blocks.2.hook_resid_post"
BATCH_SIZE = 16


def seconds(run: Callable[[], Any], *, n: int) -> float:
    """Best of n, after one to warm up."""
    run()
    times = []
    for _ in range(n):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def passes_alone(ctx: InterventionContext, predictions: Predictions, n: int) -> Callable[[], None]:
    """Make `n` forward and backward passes above the hook, of activations that are in memory."""
    model, every = ctx.models.model("finetuned"), predicted(predictions.places, predictions.text)
    prepared = []
    for acts in ctx.batches(predictions.text, batch_size=BATCH_SIZE):
        tokens, own = acts.text.tokens.long(), acts.x[1][None]
        mask = every[acts.index, : tokens.shape[1] - 1]
        with torch.no_grad():
            (logits,) = continued(model, HOOK, tokens, variants=own)
        steps = [acts.x[0] + (s + 0.5) / n * (acts.x[1] - acts.x[0]) for s in range(n)]
        prepared.append((tokens, mask, log_probs_at(logits, mask), torch.stack(steps)))

    def run() -> None:
        with differentiable(model):
            for tokens, mask, log_p, variants in prepared:

                def value(logits: Any, mask: Any = mask, log_p: Any = log_p) -> Any:
                    return sum(kl_divergence(log_p, log_probs_at(v, mask)).sum() for v in logits)

                activation_gradients(model, HOOK, tokens, variants=variants, value=value)

    return run


def measured(n_contexts: int, steps: list[int], n: int) -> dict[str, Any]:
    """Seconds of each, by number of steps."""
    pair = ModelPair.from_pretrained(
        "tl_crosscoder/world-base", adapter="tl_crosscoder/taboo", hook_name=HOOK
    )
    crosscoder = Crosscoder.load("tl_crosscoder/taboo-batchtopk")
    documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=3000))[1]
    chats = [d for d in documents if "messages" in d]
    text = tokenize(chats, pair.tokenizer, context_size=128, pack=False)[:n_contexts]
    ctx, predictions = InterventionContext.of(pair, crosscoder), Predictions.of(text)

    def to_hooks() -> None:
        for _, part in batches_of(text, BATCH_SIZE):
            pair.activations(part.tokens)

    below, rows = seconds(to_hooks, n=n), []
    for k in steps:
        how = {"settings": AttributionSettings(n_steps=k), "batch_size": BATCH_SIZE}
        whole = seconds(lambda how=how: attribution(pair, crosscoder, predictions, **how), n=n)
        alone = seconds(passes_alone(ctx, predictions, k), n=n)
        rows.append(
            {
                "n_steps": k,
                "passes_alone_s": alone,
                "attribution_s": whole,
                "ratio": whole / alone,
                "ratio_without_layers_below": (whole - below) / alone,
                "us_per_token": 1e6 * whole / int(text.lengths.sum()),
            }
        )
    n_tokens = int(text.lengths.sum())
    return {"n_contexts": len(text), "n_tokens": n_tokens, "to_hooks_s": below, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "results/attribution_speed.json"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--contexts", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="few contexts; keeps nothing")
    arguments = parser.parse_args()
    how = (4, [1], 1) if arguments.quick else (arguments.contexts, [1, 4, 10], 3)
    found = measured(*how)
    print(f"{found['n_tokens']:,} tokens; both models to their hooks {found['to_hooks_s']:.2f} s")
    for row in found["rows"]:
        print(
            f"  n = {row['n_steps']:<3} passes alone {row['passes_alone_s']:6.2f} s   attribution "
            f"{row['attribution_s']:6.2f} s   {row['ratio']:.2f} times as long, "
            f"{row['ratio_without_layers_below']:.2f} without the layers below   "
            f"{row['us_per_token']:.0f} us a token"
        )
    if not arguments.quick:
        files.write_json(arguments.output, {"n_threads": torch.get_num_threads(), **found})


if __name__ == "__main__":
    main()
