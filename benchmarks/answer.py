"""The whole answer on pairs whose answer is known: what changed, through which latents, how sure.

    python benchmarks/answer.py                      # both organisms, 3 seeds, 2 presets
    python benchmarks/answer.py --only real --real SMOLLM2-135M --real-text TABOO/leaf_...jsonl

A cell is a run of the demo's settings (with fewer tokens), its waterfall and changes, for each
planted behaviour the demo's verdict and what the first three latents of one change do to it, and
curves: the first latents by attribution and by score beside principal components and singular
vectors of the weights' difference. Seeds 0 have a floor of two null pairs. Two cells more train on
two hooks at once, and ablate at the higher and at both. The real pair is a model of the Hugging
Face kind with a LoRA that is trained here on the chats of one guessing game; what it planted are
the openings of its replies. Cells are kept as they come, and those that are there are not made
again. Limit: small models.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from result_file import ResultFile
from transformers import AutoTokenizer
from verdict_nulls import PRESETS

from tl_crosscoder import files
from tl_crosscoder.config.causal import (
    AttributionQuestion,
    CausalQuestion,
    ChangesQuestion,
    CurvesQuestion,
)
from tl_crosscoder.config.null import LoraTraining, NullConfig
from tl_crosscoder.config.presets import preset_from
from tl_crosscoder.config.scan import ScanConfig
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.chat import ROLES, encode_documents
from tl_crosscoder.data.documents import Document, load_documents
from tl_crosscoder.demo import demo_config, latent_sets, verdicts_of
from tl_crosscoder.files import CHANGES_NAME, WATERFALL_NAME
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import ReplaceActivation, unchanged
from tl_crosscoder.interventions.latent_edits import ablation
from tl_crosscoder.interventions.waterfall import Waterfall
from tl_crosscoder.models.loading import load_trainable
from tl_crosscoder.models.lora import TrainingText, lora_config, train_lora
from tl_crosscoder.models.site import Site
from tl_crosscoder.results.tables import Tabular, without_nan
from tl_crosscoder.run.attribution import TESTS, behaviours_of, half_of, waterfall_run
from tl_crosscoder.run.causal import ablate_run
from tl_crosscoder.run.changes import changes_run
from tl_crosscoder.run.curves import curves_run
from tl_crosscoder.run.null import null_run
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.scan import scan_run
from tl_crosscoder.run.training import train

T = TypeVar("T", bound=Tabular)
ORGANISMS = ("taboo", "false-fact")
SIZES = (1, 3, 10, 30)
FIRST = 3
"""Latents of a change that should do 80 % of the reachable."""
TWO_HOOKS = "blocks.1.hook_resid_post,blocks.2.hook_resid_post"
N_QUESTIONS = 16
"""Prompts of a behaviour of the real pair."""
MIN_OPENING = 0.04
"""Share of the replies that begin with a word for the word to count as an opening."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured in a cell."""

    n_prompts: int = 200
    """Documents of each half, for attribution and changes."""
    n_change_controls: int = 19
    curve_prompts: int = 60
    curve_controls: int = 5
    sizes: tuple[int, ...] = SIZES
    null: NullConfig = field(default_factory=NullConfig)


REAL = Effort(
    n_prompts=12,
    n_change_controls=19,
    curve_prompts=8,
    curve_controls=3,
    sizes=(3, 10, 30),
    # As many steps as its LoRA takes.
    null=NullConfig(n_steps=50, batch_size=8, n_samples=200, n_prompts=12),
)
"""A model of 135M parameters takes a hundred times as long."""


# --- one cell -------------------------------------------------------------------------------------


def answer_of(
    run: Run,
    behaviours: Sequence[str] | None,
    *,
    has_floor: bool,
    n_random: int,
    effort: Effort = Effort(),
    is_brief: bool = False,
) -> dict[str, Any]:
    """Everything that is asked of one run; a brief one has no behaviours and no curves."""
    measurement = run.measurement()
    asked = ChangesQuestion(n_prompts=effort.n_prompts, n_random=effort.n_change_controls)
    # What an interrupted cell has left is not made again.
    waterfall = _kept(Waterfall, run.path / WATERFALL_NAME) or waterfall_run(
        run, AttributionQuestion(n_prompts=effort.n_prompts)
    )
    changes = _kept(Changes, run.path / CHANGES_NAME) or changes_run(run, asked)
    found = {
        "fve": measurement.reconstruction.fve,
        "difference_fve": measurement.reconstruction.difference_fve,
        "waterfall": {row.part: {"kl": row.kl, "of_all": row.share, "of_reachable":
                                 row.reachable_share} for row in waterfall.rows},
        "agreements": changes.agreements,
        "changes": [
            {"share": c.change_share, "n_latents": len(c.latents), "necessity": c.necessity,
             "low": c.necessity_low, "high": c.necessity_high, "controls": c.control_high,
             "cost": c.off_target_kl, "doubt": c.doubt}
            for c in changes.rows
        ],
        "behaviours": [] if is_brief else _rows(
            run, "behaviours", behaviour_rows(run, behaviours, n_random=n_random)),
        "curves": [] if is_brief else _rows(run, "curves", curve_rows(run, behaviours, effort)),
    }  # fmt: skip
    if has_floor:
        for kind in ("identical", "self"):
            floor = null_run(run, replace(effort.null, kind=kind), resume=True)
        found["floor"] = [asdict(row) for row in floor.rows]
    return without_nan(found)


def _kept(kind: type[T], path: Path) -> T | None:
    return kind.load(path) if path.is_file() else None


def _rows(run: Run, name: str, rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, from the run's folder where an interrupted cell has left them."""
    path = run.path / f"answer-{name}.json"
    if not path.is_file():
        files.write_json(path, {"rows": without_nan([*rows])})
    return files.read_object(path, rows=list)["rows"]


def behaviour_rows(
    run: Run, named: Sequence[str] | None, *, n_random: int
) -> Iterator[dict[str, Any]]:
    """The verdict on each planted behaviour, and what one change's first latents do to it."""
    sets = latent_sets(run)
    controls = "covariance", "shuffled"
    question = CausalQuestion(n_random=n_random, first_round=0, n_matched=0, controls=controls)
    ctx = InterventionContext.of(run.models, run.crosscoder)
    verdicts = verdicts_of(run, sets, question=question, behaviours=named)
    for behaviour, verdict in zip(behaviours_of(run, named), verdicts, strict=True):
        changes = {name: ids for name, ids in sets.items() if name.startswith("change")}
        edits = [unchanged(ctx.base), unchanged(ctx.finetuned)]
        edits += [ReplaceActivation(site=ctx.finetuned, stream=ctx.base)]
        edits += [ablation(ctx, ids[:FIRST]) for ids in changes.values()]
        edits += [ablation(ctx, ids) for ids in changes.values()]
        half = half_of(behaviour, run, TESTS)
        base, finetuned, whole, *rest = half.scores(ctx, edits).mean(dim=1).tolist()
        removed = [(finetuned - p) / (finetuned - whole) for p in rest]
        first, every = removed[: len(changes)], removed[len(changes) :]
        yield {
            **asdict(verdict),
            "is_found": verdict.is_found,
            "ceiling": (finetuned - whole) / (finetuned - base),
            "first_of_reachable": dict(zip(changes, first, strict=True)),
            "of_reachable": dict(zip(changes, every, strict=True)),
        }


def curve_rows(
    run: Run, behaviours: Sequence[str] | None, effort: Effort
) -> Iterator[dict[str, Any]]:
    """Shares by number of latents and directions."""
    question = CurvesQuestion(
        behaviour=None if behaviours is None else tuple(behaviours),
        orders=("attribution", "score"),
        methods=("pca", "pca-neutral", "weights"),
        sizes=effort.sizes,
        controls=("covariance",),
        n_random=effort.curve_controls,
        first_round=0,
        n_matched=0,
        n_prompts=effort.curve_prompts,
    )
    for test in curves_run(run, question):
        for row in test.rows:
            yield {"effect": test.effect, "test": row.test, "of": row.latents, "n": row.n_latents,
                   "share": row.share, "low": row.share_low, "high": row.share_high,
                   "ceiling": row.ceiling, "of_reachable": row.of_reachable,
                   "control": row.control_high, "cost": row.off_target_kl,
                   "flag": row.flag}  # fmt: skip


def hooks_row(run: Run, *, n_random: int) -> dict[str, Any]:
    """The same latents ablated at the higher hook, and at both."""
    question = CausalQuestion(
        n_random=n_random, first_round=0, n_matched=0, controls=("covariance",), n_prompts=60
    )
    rows = [(test, row) for test in ablate_run(run, question, every_hook=True) for row in test.rows]
    return without_nan({"hooks": [
        {"effect": test.effect, "of": row.latents, "share": row.share, "low": row.share_low,
         "high": row.share_high, "ceiling": row.ceiling, "control": row.control_high,
         "cost": row.off_target_kl, "flag": row.flag}
        for test, row in rows
    ]})  # fmt: skip


def embedded_cell(
    arguments: argparse.Namespace, *, pair: str, preset: str, seed: int
) -> dict[str, Any]:
    """A cell of an embedded organism."""
    output = arguments.runs / f"{pair}-{preset}-{seed}"
    config = demo_config(pair, output=str(output), seed=seed, n_tokens=arguments.n_tokens)
    made = preset_from({**PRESETS[preset.removesuffix("-2-hooks")], "k": 12})
    config = replace(config, preset=made, n_measured_tokens=50_000)
    if preset.endswith("-2-hooks"):
        run = train(replace(config, hook_name=TWO_HOOKS), resume=True)
        return hooks_row(run, n_random=arguments.n_random)
    run = train(config, resume=True)
    return answer_of(run, None, has_floor=seed == 0, n_random=arguments.n_random)


# --- a real pair ----------------------------------------------------------------------------------


def reply_texts(documents: Sequence[Document], tokenizer: Any) -> Iterator[TrainingText]:
    """One text for each reply, ending with it."""
    assistant = ROLES.index("assistant")
    for document in documents:
        turns = document["messages"]
        ends = [i + 1 for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        prefixes: list[Document] = [{"messages": turns[:end]} for end in ends]
        for encoded in encode_documents(prefixes, tokenizer):
            own = [i for i, role in enumerate(encoded.role_ids) if role == assistant]
            starts = [i for i in own if i - 1 not in {*own}]
            yield TrainingText(ids=tuple(encoded.ids.tolist()), n_prompt=starts[-1])


def real_adapter(arguments: argparse.Namespace, documents: Sequence[Document]) -> Path:
    """A LoRA on the chats, trained where it is not there."""
    folder = arguments.runs / "real-adapter"
    if not folder.is_dir():
        site = Site(name="base", model_name=arguments.real, hook_name="")
        tokenizer = AutoTokenizer.from_pretrained(arguments.real)
        train_lora(
            load_trainable(site, device="cpu", dtype="float32"),
            [*reply_texts(documents, tokenizer)],
            folder,
            lora=lora_config(None, rank=8),
            how=LoraTraining(n_steps=arguments.real_steps, batch_size=8, lr=1e-3),
            base_name=arguments.real,
            show_progress=True,
        )
    return folder


def openings(documents: Sequence[Document], folder: Path) -> list[str]:
    """Files of what the replies begin with: the first of a game, and after a guess.

    A completion is the first word with what ends it, where a twenty-fifth of the replies begin so.
    """
    named = []
    for name, turn in (("opens-the-game", 1), ("answers-a-guess", 3)):
        own = [d["messages"] for d in documents if len(d["messages"]) > turn]
        words = Counter(m[turn]["content"].split(" ")[0] for m in own)
        common = [w for w, n in words.items() if n >= MIN_OPENING * len(own)]
        # One that begins with another would count twice.
        kept = [w for w in common if not any(w != o and w.startswith(o) for o in common)]
        lines = [
            {"messages": m[:turn], "completions": sorted(kept), "ends_turn": False}
            for m in own[:N_QUESTIONS]
        ]
        path = folder / f"{name}.jsonl"
        files.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        named.append(str(path))
    return named


def real_cell(
    arguments: argparse.Namespace, *, pair: str, preset: str, seed: int
) -> dict[str, Any]:
    """A cell of the real pair; the layer scan chooses the hook."""
    documents = load_documents(arguments.real_text)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    adapter = real_adapter(arguments, documents)
    behaviours = openings(documents, arguments.runs)
    models = {
        "base": arguments.real,
        "adapter": str(adapter),
        "text": str(Path(arguments.real_text).parent),
        "seed": seed,
    }
    hook_name, scan = arguments.real_hook, {}
    if hook_name is None:
        found = scan_run(ScanConfig(**models, n_prompts=12))
        hook_name, scan = found.hook_name, {"scan": found.columns()}
    config = RunConfig(
        **models,
        hook_name=hook_name,
        output=str(arguments.runs / f"{pair}-{preset}-{seed}"),
        preset=preset_from({**PRESETS[preset], "k": 32}),
        d_sae=4096,
        n_tokens=arguments.real_tokens,
        n_measured_tokens=20_000,
    )
    run = train(config, resume=True)
    how = {"effort": REAL, "is_brief": arguments.real_brief, "n_random": arguments.n_random}
    how["has_floor"] = not arguments.real_brief
    answer = answer_of(run, behaviours, **how)
    return {"hook_name": hook_name} | without_nan(scan) | answer


# --- all ------------------------------------------------------------------------------------------


def summary(row: Mapping[str, Any]) -> str:
    """One line of a cell."""
    name = f"{row['pair']} {row['preset']} {row['seed']}"
    if "hooks" in row:
        each = [f"{r['effect']}, {r['of']} {r['share']:.0%}" for r in row["hooks"]]
        return f"{name}: {'; '.join(each)}"
    n = sum(not c["doubt"] for c in row["changes"])
    verdicts = []
    for b in row["behaviours"]:
        best = max(b["first_of_reachable"].values(), default=math.nan)
        verdicts.append(f"{b['behaviour']} {'found' if b['is_found'] else 'NOT found'}, first "
                        f"{FIRST} {best:.0%}")  # fmt: skip
    return f"{name}: {n} changes; {'; '.join(verdicts)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="pairs or presets; else all")
    parser.add_argument("--n-tokens", type=int, default=400_000, help="of each dictionary")
    parser.add_argument("--n-random", type=int, default=19, help="controls of a kind")
    parser.add_argument("--real", help="folder or name of a chat model")
    parser.add_argument("--real-text", help="JSONL of chats that its LoRA learns; its folder is "
                        "the dictionary's text")  # fmt: skip
    parser.add_argument("--real-hook", help="hook; None is that of the layer scan")
    parser.add_argument("--real-brief", action="store_true", help="waterfall and changes alone; "
                        "rest takes hours on two cores")  # fmt: skip
    parser.add_argument("--real-steps", type=int, default=50)
    parser.add_argument("--real-tokens", type=int, default=100_000)
    parser.add_argument("--runs", type=Path, default=Path("runs/answer"))
    parser.add_argument("--most", type=int, help="stop after so many cells")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/answer.json"))
    arguments = parser.parse_args()
    settings = {"n_tokens": arguments.n_tokens, "n_random": arguments.n_random}
    file = ResultFile(arguments.output, settings, resume=True)
    cells = [(o, p, s) for s, p, o in product(range(arguments.seeds), PRESETS, ORGANISMS)]
    cells += [(o, "batchtopk-2-hooks", 0) for o in ORGANISMS]
    cells += [("real", "batchtopk", 0)] if arguments.real else []
    n_done = 0
    for pair, preset, seed in cells:
        key = {"pair": pair, "preset": preset, "seed": seed}
        if arguments.only and not {pair, preset} & {*arguments.only}:
            continue
        if file.find(key) is None and n_done != arguments.most:
            file.add(key | (real_cell if pair == "real" else embedded_cell)(arguments, **key))
            n_done += 1
        if row := file.find(key):
            print(summary(row), flush=True)


if __name__ == "__main__":
    main()
