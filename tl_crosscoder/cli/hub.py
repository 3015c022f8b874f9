"""The verbs `list`, `publish`, `export` and `import`: dictionaries from others, and for others.

No torch is imported before they run, and by `list` never.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from tl_crosscoder.hub.publish import Publication

N_MEASURED_TOKENS = 65_536
"""Tokens on which an approximate export is compared with its crosscoder."""


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


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a dictionary for SAELens alone: exactly, or for one site approximately."""

    dictionary: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the dictionary, for `--to site` of its run, or an embedded one (see `list`)."""
    output: str
    """Folder for the export; must be new or empty."""
    to: Literal["concat", "transcoder", "site"] = "concat"
    """`concat` reads and writes all sites side by side, `transcoder` reads all and writes one; both
    are exact. `site` reads and writes one model alone: the others are estimated, and what that
    costs is measured."""
    site: str | None = None
    """With `transcoder` and `site`: which site is written; None is the fine-tuned one."""
    text: str | None = None
    """With `site`: fit on the first half of this text (a file, a folder, or a `datasets` name) and
    measure on the second; None is the run's held-out text."""
    device: str = "cpu"
    """With `site`: device of the models."""

    def __call__(self) -> None:
        """Write and print what was written."""
        from tl_crosscoder.crosscoder.crosscoder import Crosscoder
        from tl_crosscoder.hub.export import export_concat, export_transcoder

        useless = {
            "--site": self.to == "concat" and self.site is not None,
            "--text": self.to != "site" and self.text is not None,
            "--device": self.to != "site" and self.device != "cpu",
        }
        if given := [name for name, is_useless in useless.items() if is_useless]:
            raise ValueError(f"{given[0]} is of no use to --to {self.to}: leave it out.")
        if self.to == "site":
            print(f"{self.output} approximates one site of the crosscoder. {self._site()}")
            return
        crosscoder = Crosscoder.load(self.dictionary)
        if self.to == "concat":
            export_concat(self.output, crosscoder)
        else:
            export_transcoder(self.output, crosscoder, site=self.site)
        print(f"{self.output} is the dictionary, exactly; its README.md has how SAELens loads it.")

    def _site(self) -> str:
        from tl_crosscoder import files
        from tl_crosscoder.hub.export import export_site, exported_site
        from tl_crosscoder.run.run import Run

        files.new_folder(self.output)
        run = Run(path=Path(self.dictionary), device=self.device)
        exported_site(run.crosscoder, self.site)
        text = run.text(run.documents(self.text))
        n = len(text) // 2
        if not n:
            raise ValueError("the text is one context: give more, to fit on and to measure on.")
        quality = export_site(
            self.output,
            run.crosscoder,
            source=run.models,
            fit_on=text[:n],
            measure_on=run.some(text[n:], N_MEASURED_TOKENS),
            site=self.site,
        )
        return (
            f"On {quality.n_tokens:,} other tokens: fraction of variance unexplained "
            f"{quality.fvu:.4f} (crosscoder {quality.fvu_of_crosscoder:.4f}); precision "
            f"{quality.precision:.1%}, recall {quality.recall:.1%} and Jaccard index "
            f"{quality.jaccard:.3f} of its active latents against the crosscoder's."
        )


@dataclass(frozen=True, kw_only=True)
class Import:
    """Read another library's crosscoder: dictionary_learning, ckkissane, crosscode."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Folder or weights file, or owner/name on the hub, with a folder or file after it."""
    output: str
    """Folder for the dictionary; must be new or empty."""
    base: str | None = None
    """Base model, where the files do not name it: a Hugging Face name or a local folder."""
    finetuned: str | None = None
    """Fine-tuned model; several with commas between."""
    adapter: str | None = None
    """LoRA adapter (PEFT) on the base model, instead."""
    hook_name: str | None = None
    """Hook point, where the files do not name it; several with commas between."""
    scales: tuple[float, ...] | None = None
    """Factors of each site's activations in training, where the files do not have them (ckkissane);
    None is 1."""
    revision: str | None = None
    """Revision of the dictionary on the hub."""

    def __call__(self) -> None:
        """Write and print what was read."""
        from tl_crosscoder import files
        from tl_crosscoder.hub.convert import convert

        folder = files.new_folder(self.output)
        crosscoder = convert(
            self.source,
            base=self.base,
            finetuned=self.finetuned,
            adapter=self.adapter,
            hook_name=self.hook_name,
            scales=self.scales,
            revision=self.revision,
        )
        crosscoder.save(folder)
        library = crosscoder.cfg.metadata.to_dict()["imported_from"]["library"]
        print(f"{folder} holds a crosscoder of {library}: {crosscoder.extra_repr()}")
