"""Dashboards in the layout that Neuronpedia imports, a folder a source.

    MODEL/LAYER-SET/release.jsonl model.jsonl sourceset.jsonl source.jsonl
                    features/batch-0.jsonl.gz activations/... explanations/...

Contract: rows of the tables `SourceRelease`, `Model`, `SourceSet`, `Source`, `Neuron`, `Activation`
and `Explanation` as Neuronpedia's schema has them (hijohnnylin/neuronpedia 008d504,
`apps/webapp/prisma/schema.prisma`), which its import route inserts; the layout is that of
SAEDashboard's exporter (jbloomAus/SAEDashboard 3ea1249, `neuronpedia/neuronpedia_export.py`).
Times are left to the database, and ids are hashes of the rows, so that the same run gives the same
bytes. Limit: nothing is uploaded: Neuronpedia reads such folders from its own storage.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl_crosscoder.integrations.sae_dashboard import DashboardNames, Feature
from tl_crosscoder.integrations.shown_site import ShownSite

CREATOR_ID = "clkht01d40000jv08hvalcvly"
"""The user that SAEDashboard's exporter and Neuronpedia's own exports file under by default."""
Row = dict[str, Any]
_OWN_FIELDS = {
    "feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "vector",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Release:
    """What the dashboards are published as."""

    name: str = "tl-crosscoder"
    """Of the release, in letters, digits and dashes."""
    title: str = "Crosscoder latents"
    creator: str = "tl_crosscoder"
    creator_id: str = CREATOR_ID
    """Of a user in that database."""
    url: str = ""
    """Of the paper or the project."""

    def __post_init__(self) -> None:
        check_name(self.name)


def check_name(name: str) -> None:
    """Raise ValueError for a name that is no part of an address on Neuronpedia."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"{name!r} is not a name on Neuronpedia: use letters, digits, '-' and '_' alone."
        )


@dataclass(frozen=True, kw_only=True)
class Explained:
    """An explanation of a latent from elsewhere, to travel with its dashboard."""

    latent: int
    text: str
    notes: str
    """By whom, and how good."""


def write_neuronpedia(
    folder: Path,
    batches: Iterator[list[Feature]],
    *,
    shown: ShownSite,
    names: DashboardNames,
    release: Release,
    explained: Iterable[Explained] = (),
) -> Path:
    """Write one source into a folder; returns where in it.

    Args:
        folder: of exports.
        batches: from `dashboard_batches`.
        shown: the model.
        names: of model and set, checked as `check_name` does.
        release: that the set belongs to.
        explained: explanations of some of the latents.
    """
    check_name(names.model_id)
    check_name(names.sae_set)
    source = f"{names.layer}-{names.sae_set}"
    key = {"modelId": names.model_id, "layer": source}
    own = folder / names.model_id / source
    texts = {e.latent: e for e in explained}
    sizes: dict[str, Any] = {}
    for i, features in enumerate(batches):
        sizes = {k: features[0][k] for k in ("n_prompts_total", "n_tokens_in_prompt", "dataset")}
        rows = {
            "features": [_neuron(f, key, names, shown, release) for f in features],
            "activations": [a for f in features for a in _activations(f, key, release)],
            "explanations": [
                _explanation(texts[f["feature_index"]], key, release)
                for f in features
                if f["feature_index"] in texts
            ],
        }
        for kind, each in rows.items():
            if each:
                _write_rows(own / kind / f"batch-{i}.jsonl.gz", each)
    for name, row in _about(shown, names, release, source, sizes).items():
        _write_rows(own / f"{name}.jsonl", [row])
    return own


def _about(
    shown: ShownSite, names: DashboardNames, release: Release, source: str, sizes: Row
) -> dict[str, Row]:
    """What the source belongs to, a row each."""
    creator = {"creatorId": release.creator_id, "visibility": "PUBLIC"}
    named = {"creatorName": release.creator, "urls": [release.url] if release.url else []}
    cfg: Any = shown.model.cfg
    return {
        "release": {
            "name": release.name,
            "description": release.title,
            "descriptionShort": release.title,
            "creatorNameShort": release.creator,
            **named,
            **creator,
        },
        "model": {
            "id": names.model_id,
            "displayName": shown.site.label,
            "displayNameShort": names.model_id,
            "layers": cfg.n_layers,
            "neuronsPerLayer": cfg.d_mlp or 0,
            "dimension": cfg.d_model,
            "owner": release.creator,
            **creator,
        },
        "sourceset": {
            "modelId": names.model_id,
            "name": names.sae_set,
            "description": f"{release.title}: {shown.hook_point}, the {shown.site.name} model",
            "releaseName": release.name,
            **named,
            **creator,
        },
        "source": {
            "id": source,
            "modelId": names.model_id,
            "setName": names.sae_set,
            "num_prompts": sizes.get("n_prompts_total"),
            "num_tokens_in_prompt": sizes.get("n_tokens_in_prompt"),
            "dataset": sizes.get("dataset"),
            **creator,
        },
    }


def _neuron(
    feature: Feature, key: Row, names: DashboardNames, shown: ShownSite, release: Release
) -> Row:
    top = max((max(a["values"]) for a in feature["activations"]), default=0.0)
    return {
        **key,
        "index": str(feature["feature_index"]),
        "sourceSetName": names.sae_set,
        "creatorId": release.creator_id,
        "maxActApprox": top,
        "hasVector": True,
        "vector": feature["vector"],
        "vectorDefaultSteerStrength": top,
        "hookName": shown.site.hook_name,
        **{name: value for name, value in feature.items() if name not in _OWN_FIELDS},
    }


def _activations(feature: Feature, key: Row, release: Release) -> list[Row]:
    rows = []
    for place, activation in enumerate(feature["activations"]):
        values = activation["values"]
        row = {
            **key,
            "index": str(feature["feature_index"]),
            "tokens": activation["tokens"],
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "binMin": activation["bin_min"],
            "binMax": activation["bin_max"],
            "binContains": activation["bin_contains"],
            "qualifyingTokenIndex": activation["qualifying_token_index"],
            "creatorId": release.creator_id,
        }
        rows.append({"id": _id(row, place), **row})
    return rows


def _explanation(explained: Explained, key: Row, release: Release) -> Row:
    # The types of explanation are a table of theirs that ours are not in, so there is none.
    row = {
        **key,
        "index": str(explained.latent),
        "description": explained.text,
        "notes": explained.notes,
        "authorId": release.creator_id,
    }
    return {"id": _id(row, 0), **row}


def _id(row: Row, place: int) -> str:
    """25 characters, as theirs: imported twice, a row is there once."""
    content = json.dumps([row, place], sort_keys=True)
    return f"c{hashlib.sha256(content.encode()).hexdigest()[:24]}"


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Postgres has no NUL in text.
    lines = "".join(json.dumps(row, allow_nan=False).replace("\\u0000", " ") + "\n" for row in rows)
    content = lines.encode()
    # Without a time, so that the same rows are the same bytes.
    path.write_bytes(gzip.compress(content, 5, mtime=0) if path.suffix == ".gz" else content)
