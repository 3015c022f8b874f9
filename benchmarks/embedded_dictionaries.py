"""Make the dictionaries that travel with the package: two organisms, two presets.

    python benchmarks/embedded_dictionaries.py            # all four, an hour or so
    python benchmarks/embedded_dictionaries.py --only taboo-delta --resume
    python benchmarks/embedded_dictionaries.py --table    # only the table of docs/dictionaries

Settings are those of `tl-crosscoder demo`, seed 0; `delta` has its loss at weight 1, which of the
weights tried makes delta latents say most of the difference (docs/measured.md). Each is trained,
measured, asked what changed, patched, ablated and steered in a folder below --runs; what `publish`
would send, with examples in `analysis.json` (the text is ours) but without `saelens/`, goes to
`pretrained/dictionaries`, a row into `pretrained/registry.yaml`, and the table into
`docs/dictionaries/pretrained.md`.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tl_crosscoder import files
from tl_crosscoder.config.causal import CausalQuestion, Control
from tl_crosscoder.config.presets import preset_from
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.demo import demo_config
from tl_crosscoder.hub.card import dictionary_card, entry_of
from tl_crosscoder.hub.published_run import SAELENS_FOLDER, PublishedRun
from tl_crosscoder.hub.registry import (
    DICTIONARIES,
    EMBEDDED,
    REGISTRY_PATH,
    WEIGHTS,
    entries,
    markdown_table,
)
from tl_crosscoder.hub.secrets import findings
from tl_crosscoder.run.attribution import behaviours_of, waterfall_run
from tl_crosscoder.run.causal import ablate_run, patch_run, steer_run
from tl_crosscoder.run.changes import changes_run
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

ORGANISMS = ("taboo", "false-fact")
PRESETS: dict[str, dict[str, Any]] = {
    "batchtopk": {"name": "batchtopk"},
    "delta": {"name": "delta", "delta_loss_weight": 1.0},
}
N_PROMPTS, N_RANDOM = 40, 60
"""Prompts and controls of each kind: three sets of latents need 60 for p = 0.05 after Holm."""
CONTROLS: tuple[Control, ...] = ("covariance", "shuffled", "matched")
"""Without isotropic directions, which are the weakest of all."""
PAGE = Path(__file__).parents[1] / "docs/dictionaries/pretrained.md"
START, END = "<!-- generated -->\n", "<!-- end -->\n"


def config_of(organism: str, preset: str, runs: Path) -> RunConfig:
    """The run of one dictionary."""
    config = demo_config(organism, output=str(runs / f"{organism}-{preset}"))
    return replace(config, preset=preset_from({**PRESETS[preset], "k": 12}))


def make(config: RunConfig, *, resume: bool) -> Path:
    """Train, measure and test one dictionary; with `resume`, what is there is kept."""
    folder = Path(config.output)
    if not (resume and (folder / "analysis.json").is_file()):
        train(config, resume=resume)
    run = Run(path=folder)
    question = CausalQuestion(
        n_prompts=N_PROMPTS, n_random=N_RANDOM, first_round=0, controls=CONTROLS
    )
    if not (resume and files.holds(folder, [files.CHANGES_NAME])):
        waterfall_run(run)
        changes_run(run)
    n_behaviours = len(behaviours_of(run, None))
    for test, names, n_files in (
        (patch_run, "patching.json", 1),
        (ablate_run, "ablation_behaviour_*.json", n_behaviours),
        (partial(steer_run, strengths=(1.0,)), "sufficiency_behaviour_*.json", n_behaviours),
    ):
        if not (resume and len([*folder.glob(names)]) == n_files):
            test(run, question)
    return folder


def embed(folder: Path, *, id: str, release: str) -> PublishedRun:
    """Put the files of a run where the package has them."""
    run = PublishedRun.read(folder, with_examples=True)
    card = dictionary_card(run, id=id, repo=None, licence="mit", release=release)
    own = {**run.files(), "README.md": card.encode()}
    left_out = (files.EXAMPLES_NAME, SAELENS_FOLDER, "baselines_")
    kept = {path: content for path, content in own.items() if not path.startswith(left_out)}
    refused = [found for path, content in kept.items() for found in findings(path, content)]
    if refused:
        raise ValueError(f"{folder} cannot travel with the package: {refused}")
    with files.replacing(DICTIONARIES / folder.name) as temporary:
        temporary.mkdir()
        for path, content in kept.items():
            data = content if isinstance(content, bytes) else content.read_bytes()
            (temporary / path).write_bytes(data)
    return run


def registry_row(run: PublishedRun, id: str) -> dict[str, Any]:
    """One dictionary of a release."""
    entry = entry_of(run, id=id, repo=EMBEDDED)
    sites = [value for name, value in entry.fve.items() if name != "difference"]
    assert entry.l0 is not None
    return {
        "id": id,
        "path": run.folder.name,
        "l0": round(entry.l0, 2),
        "variance_explained": round(min(sites), 4),
        "recipe": entry.recipe,
        "d_sae": entry.d_sae,
        "fve": {name: round(value, 4) for name, value in entry.fve.items()},
        "n_bytes": (run.folder / WEIGHTS[None]).stat().st_size,
    }


def register(release: str, run: PublishedRun, row: dict[str, Any]) -> None:
    """Put a row into the registry, in place of the one with its id."""
    path = REGISTRY_PATH
    text = path.read_text(encoding="utf-8")
    comment = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    releases: dict[str, Any] = yaml.safe_load(text)
    rows = {r["id"]: r for r in [*releases.get(release, {"saes": []})["saes"], row]}
    releases[release] = {
        "model": run.sites[0].model_name,
        "repo_id": EMBEDDED,
        "conversion_func": None,
        "sites": [
            {k: v for k, v in site.to_dict().items() if k != "scale" and v is not None}
            for site in run.sites
        ],
        "saes": [rows[id] for id in sorted(rows)],
    }
    ordered = dict(sorted(releases.items(), key=lambda item: item[1]["repo_id"] != EMBEDDED))
    content = yaml.safe_dump(ordered, sort_keys=False, width=120, default_flow_style=None)
    files.write_text(path, comment + content)


def write_table(page: Path = PAGE) -> None:
    """Renew the generated table of the page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    table = markdown_table(entries())
    files.write_text(page, f"{before}{START}{table}{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [f"{organism}-{preset}" for organism in ORGANISMS for preset in PRESETS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--runs", type=Path, default=Path("runs/embedded"))
    parser.add_argument("--resume", action="store_true", help="keep what is made already")
    parser.add_argument("--table", action="store_true", help="write the table and nothing else")
    arguments = parser.parse_args()
    for name in [] if arguments.table else arguments.only:
        organism, _, preset = name.rpartition("-")
        config = config_of(organism, preset, arguments.runs)
        folder = make(config, resume=arguments.resume)
        release = f"{EMBEDDED}-{organism}"
        run = embed(folder, id=preset, release=release)
        row = registry_row(run, preset)
        register(release, run, row)
        print(f"{release} {row}", flush=True)
    write_table()


if __name__ == "__main__":
    main()
