"""What a judge said of latents, and what it would be asked, as plain text for the terminal."""

import math

from tl_crosscoder.judge.client import Messages
from tl_crosscoder.judge.judged import Judged, JudgedLatent
from tl_crosscoder.judge.judging import Plan
from tl_crosscoder.text_tables import wrapped

_INDENT = " " * 6


def judged_table(result: Judged) -> str:
    """A latent a paragraph, and the means."""
    head = (
        f"Latents as {result.model} names them, and how well it tells by the explanation where "
        "they are active: balanced accuracy on held-out windows (95 % interval; 0.5 is chance), "
        "and by the explanation of another latent"
    )
    means = [result.mean(lambda r: r.detection), result.mean(lambda r: r.control)]
    tail = f"Mean {_number(means[0])}; by the explanation of another latent {_number(means[1])}."
    return "\n".join([wrapped(head), "", *map(_latent, result.rows), "", wrapped(tail)])


def plan_text(plan: Plan, model: str) -> str:
    """How many requests, how large, and one of each kind in full."""
    n_new = plan.n_requests - plan.n_known
    parts = [
        f"{plan.n_requests:,} requests to {model}; {plan.n_known:,} are answered already, "
        f"{n_new:,} would be sent, with about {plan.n_tokens:,} tokens in.",
        f"A request for a name:\n\n{_messages(plan.naming)}",
    ]
    if plan.detection is not None:
        parts.append(f"A request about windows:\n\n{_messages(plan.detection)}")
    return "\n\n".join([*parts, "Nothing was sent. To send it, say --send."])


def _latent(row: JudgedLatent) -> str:
    if not row.explanation:
        return f"  latent {row.latent:<6} no name that could be read"
    n_windows = row.n_active + row.n_inactive
    interval = f"[{_number(row.low)}, {_number(row.high)}]"
    line = (
        f"  latent {row.latent:<6} {_number(row.detection)} {interval:<14} other "
        f"{_number(row.control)}  {row.n_active} + {row.n_inactive} windows"
    )
    if row.n_read < n_windows:
        line += f", {n_windows - row.n_read} without a readable answer"
    said = wrapped(f"{_INDENT}{row.name}: {row.explanation}").replace("\n  ", f"\n{_INDENT}")
    return f"{line}\n{said}"


def _messages(messages: Messages) -> str:
    return "\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
