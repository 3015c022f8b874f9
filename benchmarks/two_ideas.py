"""Two ideas that were to find more of a fine-tune, beside what they start from.

    python benchmarks/two_ideas.py --output benchmarks/results/two_ideas.json    # an hour of a core

*The metric of predictions*: a dictionary is trained on activations L x with L'L = (1 - rho) F + rho
I, F = E[g g'] / tr(F) d, where g is the gradient at the hook of the log-probability of tokens drawn
from the fine-tuned model (Fisher information): errors count by what they do to predictions. L is
folded into the weights, so that the dictionary reads raw activations. rho = 1 is the usual one.
*Effect over cost*: the first 60 latents by attribution are put in the order of what each carries,
over what ablating it alone costs on neutral text plus three times the mean of these costs. A row
has both orders, judged as `tl-crosscoder benchmark` judges: mitigation by the first 3, and within a
cost. Limit: one seed.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from jaxtyping import Float
from result_file import ResultFile
from torch import Tensor

from tl_crosscoder import Crosscoder, ModelPair, TokenizedText, Trainer
from tl_crosscoder.analysis.latents import LatentMeasures
from tl_crosscoder.benchmark.grid import Bench
from tl_crosscoder.benchmark.methods import DICTIONARIES
from tl_crosscoder.benchmark.outcomes import Tests, latent_rows
from tl_crosscoder.benchmark.tables import COSTS
from tl_crosscoder.config.benchmark import BenchmarkConfig
from tl_crosscoder.config.causal import AttributionQuestion
from tl_crosscoder.crosscoder.training import CrosscoderTraining
from tl_crosscoder.interventions.attribution_result import Attribution
from tl_crosscoder.interventions.causal import TrialMaker
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.models.forward import activation_gradients
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.run import training
from tl_crosscoder.run.attribution import attribute_run
from tl_crosscoder.run.run import Run
from tl_crosscoder.train.checkpoint import TrainState

ORGANISMS = ("taboo", "careless-health-gpt2", "false-fact", "careless-health")
METHODS = ("delta", "batchtopk")
RHOS = (0.1, 1.0)
N_CONTEXTS, N_CANDIDATES = 128, 60


def fisher(pair: ModelPair, text: TokenizedText) -> Float[Tensor, "d_model d_model"]:
    """F of the fine-tuned model, float64, of trace d_model."""
    ctx, generator = InterventionContext.of(pair), torch.Generator().manual_seed(0)
    model, site = pair.models[ctx.finetuned], pair.model_sites[ctx.finetuned]
    total = torch.zeros(site.d_model, site.d_model, dtype=torch.float64)
    for acts in ctx.batches(text[:N_CONTEXTS], batch_size=16):
        counted = acts.text.mask[:, 1:]

        def value(logits: Tensor, counted: Tensor = counted) -> Float[Tensor, ""]:
            log_p = logits[0, :, :-1, : pair.d_vocab].log_softmax(dim=-1)
            drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator)
            return (log_p.flatten(0, 1).gather(-1, drawn).view(counted.shape) * counted).sum()

        tokens, x = acts.text.tokens.long(), acts.x[ctx.finetuned][None]
        how = {"variants": x, "value": value}
        (g,) = activation_gradients(model, site.hook_name, tokens, **how)
        own = g[acts.text.mask].double()
        total += own.T @ own
    return total / total.trace() * len(total)


@dataclass(frozen=True, eq=False)
class Mapped:
    """Site scales, and then L: what a batch is multiplied by."""

    scales: Tensor
    L: Float[Tensor, "d_model d_model"]

    def __rmul__(self, x: Tensor) -> Tensor:
        """Activations in the space of training."""
        return (x * self.scales) @ self.L


class MetricTrainer(Trainer):
    """Trains on L x, and folds L."""

    rho = 1.0
    _root: Tensor | None = None

    @property
    def root(self) -> Float[Tensor, "d_model d_model"]:
        """L, symmetric, float64."""
        if self._root is None:
            assert isinstance(self.source, ModelPair)
            F = fisher(self.source, self.loader.text)
            eye = torch.eye(len(F), dtype=F.dtype)
            values, vectors = torch.linalg.eigh((1 - self.rho) * F + self.rho * eye)
            self._root = (vectors * values.sqrt()) @ vectors.T
        return self._root

    def _scales(self, state: TrainState) -> Any:
        return Mapped(super()._scales(state), self.root.float())

    def _metrics(self, output: Any, state: TrainState) -> dict[str, float]:
        dead = self.is_dead(state).float().mean().item()
        l0 = output.codes.l0().float().mean().item()
        return {"loss": output.loss.item(), "l0": l0, "dead_share": dead}

    def _saved(self, trained: CrosscoderTraining) -> Crosscoder:
        found, n = trained.to_inference(), len(self.cfg.sites)
        L, inverse = self.root, torch.linalg.inv(self.root)
        d = len(L)
        with torch.no_grad():
            encoder = found.W_enc.double().view(n, d, -1)
            found.W_enc.copy_((L @ encoder).reshape(n * d, -1))
            found.W_dec.copy_((found.W_dec.double().view(-1, n, d) @ inverse).flatten(1))
            found.b_dec.copy_((found.b_dec.double().view(n, d) @ inverse).flatten())
        found.fold_site_scales_(self.begin().scales)
        assert self.output
        found.save(self.output)
        return found


def over_cost(
    ctx: InterventionContext, tests: Tests, latents: LatentMeasures, carried: Attribution, *, n: int
) -> list[int]:
    """The first latents by what each carries over what it costs."""
    top = carried.latents.topk(min(N_CANDIDATES, len(carried.latents))).indices
    maker = TrialMaker(ctx=ctx, latents=latents, settings=tests.settings, null=None, factors={})
    edits = [maker.trial("necessity", "", j[None], has_controls=False).own for j in top]
    costs = OffTarget(ctx=ctx, text=tests.neutral)
    cost = costs.of(edits)[0].sum(dim=1) / costs.counts.sum()
    score = carried.latents[top] / (cost + 3 * cost.mean())
    return top[score.argsort(descending=True)][:n].tolist()


def judged(rows: Sequence[dict[str, Any]], n_named: int) -> dict[str, float]:
    """Mitigation of the planted behaviours, of each order."""
    found: dict[str, float] = {}
    planted = [r for r in rows if r["test"] == "necessity" and r["effect"] != "predictions"]
    for order in dict.fromkeys(r["ranking"] for r in planted):
        own = [r for r in planted if r["ranking"] == order]
        found[f"{order}: first {n_named}"] = fmean(
            r["of_reachable"] for r in own if r["n"] == n_named
        )
        for bound in COSTS.values():
            most = []
            for effect in {r["effect"] for r in own}:
                cheap = [r for r in own if r["effect"] == effect and r["cost"] <= bound]
                most.append(max(cheap, key=lambda r: r["n"])["of_reachable"] if cheap else 0.0)
            found[f"{order}: within {bound:g}"] = fmean(most)
    return found


def row(name: str, method: str, rho: float, config: BenchmarkConfig) -> dict[str, Any]:
    """One dictionary."""
    bench, started = Bench(entry=organism(name), config=config, seed=0), time.perf_counter()
    run_config = bench.run_config(method, DICTIONARIES[method])
    kind = type("Own", (MetricTrainer,), {"rho": rho}) if rho < 1 else Trainer
    with mock.patch.object(training, "Trainer", kind):
        training.train_all([run_config], models=bench.models)
    run = Run(path=Path(run_config.output), loaded=bench.models)
    measured, n = run.measurement(), max(config.sizes)
    carried = attribute_run(run, AttributionQuestion(n_prompts=config.n_attributed))
    ctx, tests = InterventionContext.of(run.models, run.crosscoder), bench.tests
    rankings = {
        "attribution": carried.latents.topk(n).indices.tolist(),
        "over cost": over_cost(ctx, tests, measured.latents, carried, n=n),
    }
    rows = [*latent_rows(ctx, tests, latents=measured.latents, rankings=rankings)]
    fit = measured.reconstruction
    return {
        **judged(rows, config.n_named),
        "fve": fit.fve,
        "difference_fve": fit.difference_fve,
        "l0": fit.l0,
        "dead": fit.dead_share,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--organisms", nargs="*", default=ORGANISMS)
    parser.add_argument("--output", type=Path, help="JSON file of the rows")
    parser.add_argument("--quick", action="store_true", help="one small dictionary")
    a = parser.parse_args()
    config, cells = BenchmarkConfig(n_matched=0), [(m, r) for m in METHODS for r in RHOS]
    if a.quick:
        a.organisms, cells = ["taboo"], [("batchtopk", 0.5)]
        config = replace(config, quick=True).shortened()
    settings = {name: getattr(config, name) for name in ("n_tokens", "d_sae", "k", "n_random")}
    file = ResultFile(a.output, settings, resume=True)
    for name in a.organisms:
        for method, rho in cells:
            key = {"organism": name, "method": method, "rho": rho}
            if file.find(key) is None:
                with tempfile.TemporaryDirectory() as folder:
                    file.add(key | row(name, method, rho, replace(config, work=folder)))
            shown = {k: v for k, v in (file.find(key) or {}).items() if ":" in k}
            print(f"{key}: " + ", ".join(f"{k} {v:.2f}" for k, v in shown.items()), flush=True)


if __name__ == "__main__":
    main()
