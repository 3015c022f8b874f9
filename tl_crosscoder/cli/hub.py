"""The verbs `list` and `publish`: dictionaries from others, and for others.

No torch is imported before they run, and by `list` never.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from tl_crosscoder.hub.publish import Publication


@dataclass(frozen=True, kw_only=True)
class List:
    """List the dictionaries that can be loaded by name, and which of them need no network."""

    def __call__(self) -> None:
        """Print."""
        from tl_crosscoder.hub.registry import entries, terminal_table

        print(terminal_table(entries()))


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Publish a dictionary on the Hugging Face Hub; without --push, show what would be sent."""

    dictionary: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, or an embedded dictionary (see `list`)."""
    repo: str
    """Repository, owner/name; made where it does not exist. It may hold several dictionaries."""
    license: str | None = None
    """Identifier of a licence on the hub: mit, apache-2.0, gemma, ... Needed to publish."""
    id: str | None = None
    """Name of the dictionary in the repository; None is the name of its folder."""
    push: bool = False
    """Send it. You must be logged in (`hf auth login`, or HF_TOKEN)."""
    private: bool = False
    """Make the repository private, if it is new."""
    overwrite: bool = False
    """Replace a dictionary of the same id."""
    with_examples: bool = False
    """Also send tokens in context: they are text of the dataset."""
    rename: tuple[str, ...] = ()
    """HERE=THERE, several: a model or text by what it is called here, as others find it."""

    def __call__(self) -> None:
        """Show, and send with --push."""
        from tl_crosscoder.hub.publish import check_login, plan_publication, push

        if self.push:
            check_login()  # before long work
        plan = plan_publication(
            Path(self.dictionary),
            self.repo,
            licence=self.license,
            id=self.id,
            private=self.private,
            overwrite=self.overwrite,
            with_examples=self.with_examples,
            renamed=dict(_renaming(r) for r in self.rename),
        )
        print(_shown(plan, with_cards=not self.push))
        if plan.refusals:
            print("\nRefused, and nothing sent:")
            print(*(f"  {r}" for r in plan.refusals), sep="\n")
            n = len(plan.refusals)
            raise ValueError(f"{plan.repo}: {n} reason{'s' if n > 1 else ''} not to publish this.")
        if self.push:
            print(f"\nPublished: {push(plan)}")
        else:
            print("\nNothing was sent. Add --push to publish this.")


def _renaming(given: str) -> tuple[str, str]:
    here, equals, there = given.partition("=")
    if not (here and equals and there):
        raise ValueError(f"--rename is {given!r}: give HERE=THERE, such as runs/sft=org/sft.")
    return here, there


def _shown(plan: "Publication", *, with_cards: bool) -> str:
    from tl_crosscoder.files import size_text

    state = "a new repository" if plan.repository.head is None else "which exists"
    private, sizes = ", private" if plan.private else "", plan.sizes()
    total = size_text(sum(sizes.values()))
    lines = [f"{plan.id} to {plan.repo} ({state}{private}), {total} in all:", ""]
    lines += [f"  {path:<56} {size_text(n_bytes):>10}" for path, n_bytes in sizes.items()]
    lines += [f"  {path:<56} {'deleted':>10}" for path in plan.deleted]
    for path in ("README.md", f"{plan.id}/README.md") if with_cards else ():
        lines += ["", f"--- {path} ---", "", plan.text(path).strip()]
    lines += ["", *(f"warning: {w}" for w in plan.warnings)]
    return "\n".join(lines).rstrip()
