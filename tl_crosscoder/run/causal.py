"""Interventions on a run's folder: what `tl-crosscoder patch`, `ablate` and `steer` do.

Contract: each opens the run, tests sets of latents with controls, and leaves its result as JSON in
the folder (`patching.json`, `ablation_predictions.json`, `ablation_behaviour_NAME.json` and so on),
which is returned. Prompts are of the half of the documents that no ranking is made on. Limit: where
none is named, neutral text is the run's held-out text, in which the fine-tune may have a part.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tl_crosscoder.analysis.latents import rank_latents
from tl_crosscoder.config.causal import (
    CausalQuestion,
    ControlledQuestion,
    EffectQuestion,
    LatentsQuestion,
    Order,
)
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.chat import encode_documents
from tl_crosscoder.data.documents import Document
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.files import (
    ATTRIBUTION_NAMES,
    CAUSAL_NAMES,
    CHANGES_NAME,
    GENERATIONS_NAMES,
    HELD_OUT_NAME,
    MINED_NAME,
    PATCHING_NAME,
    WATERFALL_NAME,
)
from tl_crosscoder.interventions.base_estimate import BaseEstimate
from tl_crosscoder.interventions.behaviour import Behaviour, Effect, Predictions
from tl_crosscoder.interventions.causal import causal_test, causal_trials
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import ControlSettings
from tl_crosscoder.interventions.costs import OffTarget
from tl_crosscoder.interventions.edits import Edit
from tl_crosscoder.interventions.latent_edits import Mode, ablation, activation_norms, steering
from tl_crosscoder.interventions.live import edited
from tl_crosscoder.interventions.mitigation import export_mitigation, measure_estimate
from tl_crosscoder.interventions.patching import PatchingResult, patching
from tl_crosscoder.interventions.several_hooks import (
    ablation_at_every_hook,
    hook_contexts,
    in_turn,
)
from tl_crosscoder.interventions.trials import Trial, result_of, run_trials
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.run.attribution import attribute_run as attribute_run
from tl_crosscoder.run.attribution import attribution_of, behaviours_of, for_tests, prompts_of
from tl_crosscoder.run.run import Run

N_NEUTRAL_TOKENS = 4096
N_NEW_TOKENS = 40
"""Tokens that a model writes after a prompt."""
SIZES = (3, 10, 30)
"""Latents of the sets that are tested where none are named."""
NOTHING_CARRIED = (
    "No latent carries anything of the change on this text: the models do not differ at the hook, "
    "so there is nothing to cause."
)
Prompt = str | Sequence[Mapping[str, Any]]
"""What a user says (plain text where there is no chat template), or the messages of a chat."""
Samples = list[tuple[str, dict[str, str]]]
"""Prompts, and what each model writes after them."""


def patch_run(run: Run, question: LatentsQuestion) -> PatchingResult:
    """The table of KL recovery."""
    latents, prompts = run.measurement().latents, prompts_of(run, question)
    result = patching(
        run.models,
        run.crosscoder,
        prompts,
        latents=latents,
        extra=_sets(run, question),
        seed=question.seed,
        show_progress=True,
    )
    result.save(run.path / PATCHING_NAME)
    return result


def ablate_run(
    run: Run, question: CausalQuestion, *, mode: Mode = "delta", every_hook: bool = False
) -> list[CausalTest]:
    """Necessity for predictions, and for a behaviour where there is one.

    With `every_hook`, of a dictionary over several: at the highest hook alone, and at all in turn.
    """
    how = {"tests": ("necessity",), "mode": mode, "every_hook": every_hook}
    return _tested(run, question, name="ablation", **how)


def steer_run(
    run: Run, question: CausalQuestion, *, strengths: Sequence[float] = (0.5, 1.0, 2.0)
) -> list[CausalTest]:
    """Sufficiency: what latents add, inserted into the base model, and steering by them."""
    alphas = tuple(strengths)
    return _tested(run, question, tests=("insert", "steer"), name="sufficiency", alphas=alphas)


def export_run(run: Run, question: LatentsQuestion, folder: Path, *, mode: Mode = "delta") -> str:
    """Export the mitigation by the chosen latents, with what its estimate of the base loses."""
    ctx, latents = InterventionContext.of(run.models, run.crosscoder), chosen_latents(run, question)
    text, estimate, loss = run.text(run.documents(question.text)), None, None
    if mode != "project":
        n = max(1, len(text) // 2)
        estimate = BaseEstimate.fit(ctx.models, text[:n])
        rest = run.some(text[n:], N_NEUTRAL_TOKENS) if len(text) > n else text
        loss = measure_estimate(ctx, estimate, rest, latents=latents, mode=mode)
    export_mitigation(folder, ctx, latents, mode=mode, estimate=estimate, loss=loss)
    message = (
        f"The mitigation by {len(latents)} latents is in {folder}: hook.py says how to use it."
    )
    if loss is None:
        return message
    return (
        f"{message}\nIt estimates the base activation from the fine-tuned one: KL to the exact "
        f"ablation {loss.kl:.4f}, of that ablation to the fine-tuned model "
        f"{loss.kl_of_ablation:.4f} nats a token."
    )


def necessity_of(
    run: Run,
    effect: Effect,
    question: CausalQuestion,
    *,
    sets: Mapping[str, Sequence[int]],
    show_progress: bool = False,
) -> CausalTest:
    """What ablating sets of latents removes of one effect; nothing is kept in the folder."""
    return causal_test(
        run.models,
        run.crosscoder,
        effect,
        neutral_text(run, question.text, neutral=question.neutral),
        latents=run.measurement().latents,
        sets=sets,
        tests=["necessity"],
        settings=control_settings(question, n_matched=question.n_matched),
        show_progress=show_progress,
    )


def _tested(
    run: Run,
    question: CausalQuestion,
    *,
    tests: Sequence[str],
    name: str,
    mode: Mode = "delta",
    alphas: tuple[float, ...] = (1.0,),
    every_hook: bool = False,
) -> list[CausalTest]:
    ctx, latents = InterventionContext.of(run.models, run.crosscoder), run.measurement().latents
    contexts = hook_contexts(ctx) if every_hook else [ctx]
    settings = control_settings(question, n_matched=question.n_matched, alphas=alphas)
    neutral = neutral_text(run, question.text, neutral=question.neutral)
    null = null_of(run, question)

    def trials() -> list[Trial]:
        if not (sets := _sets(run, question)):
            return []
        how = {"tests": tests, "mode": mode, "settings": settings, "null": null}
        each = [causal_trials(c, neutral, latents=latents, sets=sets, **how) for c in contexts]
        several = zip(*each, strict=True) if every_hook else ()
        return [*each[-1], *(in_turn(ctx.models, trials) for trials in several)]

    costs = OffTarget(ctx=contexts[-1], text=neutral)
    return each_effect(run, question, costs, trials, settings=settings, name=name)


def null_of(run: Run, question: ControlledQuestion) -> Crosscoder | None:
    """The other dictionary whose directions are a control."""
    return Crosscoder.load(question.null, device=run.device) if question.null else None


def control_settings(
    question: EffectQuestion, *, n_matched: int, alphas: tuple[float, ...] = (1.0,)
) -> ControlSettings:
    """Settings of the controls that a question asks for."""
    return ControlSettings(
        controls=question.controls,
        n_random=question.n_random,
        n_matched=n_matched,
        first_round=question.first_round,
        alphas=alphas,
        max_ce_cost=question.max_ce_cost,
        seed=question.seed,
    )


def each_effect(
    run: Run,
    question: EffectQuestion,
    costs: OffTarget,
    make_trials: Callable[[], list[Trial]],
    *,
    settings: ControlSettings,
    name: str,
) -> list[CausalTest]:
    """Try the same edits for every effect, and keep the results in the run's folder, a file each.

    Steering is the same at every token, so it is scored by behaviours where there are any. Trials
    are made when all that is asked has been found.
    """
    results, measured = [], effects(run, question)
    trials = make_trials()
    for effect in measured:
        kind, is_behaviour = "predictions", isinstance(effect, Behaviour)
        if is_behaviour:
            kind = f"behaviour_{effect.name.replace(' ', '-')}"
            # Earlier versions kept one behaviour, of whatever name.
            (run.path / f"{name}_behaviour.json").unlink(missing_ok=True)
        own = [t for t in trials if t.test != "steer" or is_behaviour or len(measured) == 1]
        how = {"trials": own, "settings": settings, "show_progress": True}
        result = (
            run_trials(costs.ctx, effect, costs, **how)
            if own
            else result_of(effect, settings, note=NOTHING_CARRIED)
        )
        result.save(run.path / f"{name}_{kind}.json")
        results.append(result)
    return results


def effects(run: Run, question: EffectQuestion) -> list[Effect]:
    """What can be measured: predictions always, behaviours where any are known."""
    behaviours = [for_tests(b, run) for b in behaviours_of(run, question.behaviour)]
    return [Predictions.of(prompts_of(run, question)), *behaviours]


def neutral_text(run: Run, text: str | None = None, *, neutral: str | None = None) -> TokenizedText:
    """Text on which cost and health are measured: the one named, or some held-out text.

    Of an embedded organism without the sources that are about what was planted. `text` stands for
    the held-out text where there is none.
    """
    if neutral is not None:
        return run.some(run.text(run.documents(neutral)), N_NEUTRAL_TOKENS)
    name = run.organism()
    planted = organism(name).planted_sources if name else ()
    documents = _held_out(run, text)
    others = [d for d in documents if d.get("source") not in planted]
    return run.some(run.text(others or documents), N_NEUTRAL_TOKENS)


def held_out_text(run: Run, text: str | None = None) -> TokenizedText:
    """Some of the run's held-out text, or of the text named where there is none."""
    return run.some(run.text(_held_out(run, text)), N_NEUTRAL_TOKENS)


def _held_out(run: Run, text: str | None) -> list[Document]:
    return run.documents(None if (run.path / HELD_OUT_NAME).is_file() else text)


def ranked_latents(run: Run, *, n: int, order: Order, text: str | None = None) -> list[int]:
    """The first latents of an order among those that fire; none where nothing is carried."""
    latents = run.measurement().latents
    if order != "attribution":
        return rank_latents(latents, n=n, by=order).latents
    carried = attribution_of(run, text=text).ranking()
    return [j for j in carried if latents.n_active[j] > 0][:n]


def _sets(run: Run, question: LatentsQuestion) -> dict[str, list[int]]:
    """The latents asked for, or the first of the order; none where the models do not differ."""
    if question.latents:
        return {"chosen": list(question.latents)}
    ranked = ranked_latents(run, n=max(SIZES), order=question.order, text=question.text)
    sizes = [n for n in SIZES if n <= len(ranked)] or [len(ranked)]
    return {f"top {n}": ranked[:n] for n in sizes if n}


def chosen_latents(run: Run, question: LatentsQuestion) -> list[int]:
    """The latents asked for, or the largest set of the ranking."""
    return [[], *_sets(run, question).values()][-1]


# --- what models write ----------------------------------------------------------------------------


def samples(
    run: Run,
    ctx: InterventionContext,
    prompts: Sequence[Prompt],
    *,
    sites: Sequence[int],
    edits: Mapping[str, Edit],
    **options: Any,
) -> Samples:
    """What the models of some sites write after prompts, then what each edit of one makes of it.

    Options are those of `ModelPair.generate_tokens`.
    """
    ids = [prompt_ids(run, prompt) for prompt in prompts]
    texts = {
        name: ctx.models.generate(ids, site=name, **options) for name in map(ctx.site_name, sites)
    }
    for name, edit in edits.items():
        with edited(ctx, edit) as model:
            texts[name] = model.generate(ids, **options)
    return [
        (prompt_label(p), {name: each[i] for name, each in texts.items()})
        for i, p in enumerate(prompts)
    ]


def ablation_samples(
    run: Run,
    question: LatentsQuestion,
    prompts: Sequence[str],
    *,
    mode: Mode = "delta",
    every_hook: bool = False,
) -> Samples:
    """What base, fine-tuned and ablated model write, greedily."""
    ctx = InterventionContext.of(run.models, run.crosscoder)
    ablate = ablation_at_every_hook if every_hook else ablation
    edits = {"ablated": ablate(ctx, chosen_latents(run, question), mode)}
    sites = (ctx.base, ctx.finetuned)
    return samples(run, ctx, prompts, sites=sites, edits=edits, max_new_tokens=N_NEW_TOKENS)


def steering_samples(
    run: Run, question: LatentsQuestion, prompts: Sequence[str], *, strengths: Sequence[float]
) -> Samples:
    """What the base model writes, and steered by the first latent at each strength."""
    ctx = InterventionContext.of(run.models, run.crosscoder)
    site, latent = ctx.site_name(ctx.base), chosen_latents(run, question)[0]
    norm = activation_norms(ctx.models, neutral_text(run, question.text))[site]
    edits = {
        f"latent {latent} x {s:g}": steering(ctx, latent, strength=s, norm=norm, site=site)
        for s in strengths
    }
    return samples(run, ctx, prompts, sites=[ctx.base], edits=edits, max_new_tokens=N_NEW_TOKENS)


def several_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several, as several; a list of messages is one chat."""
    is_one = isinstance(prompts, str) or all(isinstance(p, Mapping) for p in prompts)
    return cast(list[Prompt], [prompts] if is_one and prompts else [*prompts])


def prompt_label(prompt: Prompt) -> str:
    """A prompt in a table: the turns of a chat one after the other."""
    turns = [prompt] if isinstance(prompt, str) else [str(m.get("content", "")) for m in prompt]
    return " / ".join(turns)


def prompt_ids(run: Run, prompt: Prompt) -> list[int]:
    """Ids of a prompt, up to where the assistant begins."""
    tokenizer = run.models.tokenizer
    is_chat = bool(tokenizer.chat_template) or not isinstance(prompt, str)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    document: Document = {"messages": turns} if is_chat else {"text": prompt}
    (encoded,) = encode_documents([document], tokenizer, add_generation_prompt=is_chat)
    return encoded.ids.tolist()


def causal_files(folder: Path) -> list[Path]:
    """Results that are a `CausalTest` in a run's folder."""
    return sorted(path for name in CAUSAL_NAMES for path in folder.glob(name))


def saved_files(folder: Path) -> list[Path]:
    """Results of interventions in a run's folder."""
    of_logits = MINED_NAME, *GENERATIONS_NAMES
    of_change = *ATTRIBUTION_NAMES, WATERFALL_NAME, CHANGES_NAME
    names = (*of_change, PATCHING_NAME, *CAUSAL_NAMES, *of_logits)
    return sorted(path for name in names for path in folder.glob(name))
