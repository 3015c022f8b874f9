"""What a publisher should know before sending, and may send all the same.

Contract: sentences, each with the next step. Limit: what must not be sent is in `publish_checks`.
"""

from collections.abc import Iterator
from pathlib import Path

from tl_crosscoder.hub.card import hub_models
from tl_crosscoder.hub.publish_files import PublishedRun
from tl_crosscoder.hub.publish_repository import Repository
from tl_crosscoder.train.record import RECORD_NAME


def run_warnings(run: PublishedRun, repository: Repository) -> Iterator[str]:
    """What the card will lack, and how to get it."""
    if repository.unread is not None:
        yield (
            f"the repository could not be read, so it is shown as if it were new: "
            f"{repository.unread}"
        )
    missing = {
        "measures": ("`tl-crosscoder analyze --fresh`", run.measurement is None),
        "KL recovery": ("`tl-crosscoder patch`", run.patching is None),
        "interventions": ("`tl-crosscoder ablate` and `steer`", not run.causal_tests),
    }
    if run.record is None:
        yield f"there is no {RECORD_NAME}: nobody can tell how the dictionary was made."
        if run.measurement is None:  # the verbs want a run
            yield (
                "the card has no measures: measure it in Python first, "
                "tl_crosscoder.measure(models, crosscoder, text).save(folder)."
            )
        return
    for what, (how, is_missing) in missing.items():
        if is_missing:
            yield f"the card has no {what}: run {how} first."


def model_warnings(run: PublishedRun) -> Iterator[str]:
    """Models that others cannot load, or that may be other ones by then."""
    for site in run.read_sites:
        name = site.adapter or site.model_name
        if Path(name).exists():
            yield (
                f"site {site.name} names the folder {name!r}: nobody else has it. Say what others "
                f"load with --rename {name}=owner/name."
            )
        elif site.revision is None and name in hub_models(run):
            yield (
                f"no revision of {name} is recorded (site {site.name}): if it changes on the hub, "
                "the dictionary no longer fits."
            )
