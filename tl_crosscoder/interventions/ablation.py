"""Ablation of latents: the fine-tuned model without what some latents add to it.

    delta:    x^1 - sum_{j in S} f_j (d_j^1 - d_j^0)     what the fine-tune added, the default
    zero:     x^1 - sum_{j in S} f_j d_j^1               all that the latents write
    project:  x^1 - Q Q' x^1                             Q spans the d_j^1; at every token, no codes

`delta` takes back the patch of Minder et al. 2025. Contract: `ablation` is an edit `[batch, pos,
d_model]` for scoring; `ablated` holds it in the model while a context is open, generation included.
Tokens without codes (BOS, first position) stay as they are under `delta` and `zero`. Limit: one
hook point.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jaxtyping import Int
from torch import Tensor

from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.interventions.base_estimate import BaseEstimate
from tl_crosscoder.interventions.edits import Edit, Projection, Shift
from tl_crosscoder.interventions.live import EditedModel, edited
from tl_crosscoder.interventions.mitigation import (
    Mitigated,
    Mitigation,
    Mode,
    check_mode,
    taken_out,
)
from tl_crosscoder.interventions.running import unchanged
from tl_crosscoder.interventions.subject import Subject
from tl_crosscoder.site_difference import SiteDifference


def ablation(
    subject: Subject, latents: Sequence[int] | Int[Tensor, " n"], mode: Mode = "delta"
) -> Edit:
    """The fine-tuned stream without some latents; the stream itself without any.

    Raises:
        ValueError: an unknown mode, or latents out of range.
    """
    check_mode(mode)
    ids, site = subject.latents(latents), subject.finetuned
    if not len(ids):
        return unchanged(site)
    rows = taken_out(subject, ids, mode)
    if mode == "project":
        return Projection(site=site, stream=site, directions=rows)
    return Shift(site=site, stream=site, latents=ids, directions=rows, sign=-1.0)


@contextmanager
def ablated(
    models: ComparedModels | SiteDifference,
    crosscoder: Crosscoder,
    latents: Sequence[int] | Int[Tensor, " n"],
    *,
    mode: Mode = "delta",
    estimate: BaseEstimate | None = None,
    compared: tuple[str, str] | None = None,
) -> Iterator[EditedModel]:
    """The fine-tuned model without some latents, while the context is open.

        with ablated(pair, crosscoder, [3, 17]) as model:
            model.generate("Once upon a time")
            model.logits(tokens)

    Codes are of both models on the same tokens, so each forward pass costs one of the base model to
    its hook, and generation runs without key-value cache. With an `estimate` only the fine-tuned
    model runs, and the cache is used; what that loses is told by `measure_estimate`.

    Args:
        models: a pair, or more sites; of a diff-SAE, its difference.
        crosscoder: trained on them.
        latents: which to take out.
        mode: see the module.
        estimate: of the base stream from the fine-tuned one; None runs the base model.
        compared: names of the sites, base first; the other way round ablates the base model.

    Raises:
        ValueError: a dictionary or an estimate of other models, an unknown mode, latents out of
            range, or an estimate where the mode needs no base stream.
    """
    subject = Subject.of(models, crosscoder, compared=compared)
    if estimate is None:
        edit = ablation(subject, latents, mode)
    else:
        mitigation = Mitigation.of(subject, latents, mode=mode, estimate=estimate)
        edit = Mitigated(site=subject.finetuned, mitigation=mitigation)
    with edited(subject, edit) as model:
        yield model
