"""Dashboards in the layout that Neuronpedia imports, a folder a source.

    MODEL/LAYER-SET/release.jsonl model.jsonl sourceset.jsonl source.jsonl
                    features/batch-0.jsonl.gz activations/... explanations/...

Rows are those of the tables `SourceRelease`, `Model`, `SourceSet`, `Source`, `Neuron`, `Activation`
and `Explanation` of Neuronpedia's schema (hijohnnylin/neuronpedia 008d504,
`apps/webapp/prisma/schema.prisma`), which its import route inserts; the layout is that of
SAEDashboard's exporter (jbloomAus/SAEDashboard 3ea1249, `neuronpedia/neuronpedia_export.py`).
Times are left to the database, and ids are hashes of the rows, so that the same run gives the same
bytes. Limit: nothing is uploaded: Neuronpedia reads such folders from its own storage.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tl_crosscoder.integrations.config import HandoffConfig
from tl_crosscoder.integrations.judging import Judged
from tl_crosscoder.integrations.sae_dashboard import Feature, ShownSite

Row = dict[str, Any]
_OWN_FIELDS = {
    "feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "vector",
}  # fmt: skip


def write_neuronpedia(
    folder: Path,
    batches: Iterator[list[Feature]],
    *,
    shown: ShownSite,
    config: HandoffConfig,
    judged: Judged | None = None,
) -> Path:
    """Write one source into a folder; returns where in it.

    Args:
        folder: of exports.
        batches: from `dashboard_batches`.
        shown: the model.
        config: names of model, set and release.
        judged: names of some of the latents, which go along as explanations.
    """
    model_id = config.model_id or shown.slug
    source = f"{shown.layer}-{config.set_name}"
    key = {"modelId": model_id, "layer": source}
    own, sizes = folder / model_id / source, {}
    named = {r.latent: r for r in judged.rows if r.explanation} if judged else {}
    for i, features in enumerate(batches):
        sizes = {k: features[0][k] for k in ("n_prompts_total", "n_tokens_in_prompt", "dataset")}
        rows: dict[str, list[Row]] = {"features": [], "activations": [], "explanations": []}
        for f in features:
            latent = {**key, "index": str(f["feature_index"])}
            rows["features"].append(_neuron(f, latent, shown, config))
            rows["activations"] += _activations(f, latent, config.creator_id)
            if judged and (row := named.get(f["feature_index"])):
                notes = (
                    f"By {judged.model}. Balanced accuracy of detection {row.detection:.2f} "
                    f"[{row.detection_low:.2f}, {row.detection_high:.2f}] on {row.n_read} windows."
                )
                # The types of explanation are a table of theirs that ours are not in.
                texts = {"description": f"{row.name}: {row.explanation}", "notes": notes}
                explanation = {**latent, **texts, "authorId": config.creator_id}
                rows["explanations"].append(_with_id(explanation))
        for kind, each in rows.items():
            if each:
                _write_rows(own / kind / f"batch-{i}.jsonl.gz", each)
    for name, row in _about(shown, config, model_id, sizes).items():
        _write_rows(own / f"{name}.jsonl", [row])
    return own


def _about(shown: ShownSite, config: HandoffConfig, model_id: str, sizes: Row) -> dict[str, Row]:
    """What the source belongs to, a row each."""
    creator = {"creatorId": config.creator_id, "visibility": "PUBLIC"}
    named = {"creatorName": config.creator, "urls": [config.url] if config.url else []}
    cfg: Any = shown.model.cfg
    return {
        "release": {
            "name": config.release,
            "description": config.title,
            "descriptionShort": config.title,
            "creatorNameShort": config.creator,
            **named,
            **creator,
        },
        "model": {
            "id": model_id,
            "displayName": shown.site.label,
            "displayNameShort": model_id,
            "layers": cfg.n_layers,
            "neuronsPerLayer": cfg.d_mlp or 0,
            "dimension": cfg.d_model,
            "owner": config.creator,
            **creator,
        },
        "sourceset": {
            "modelId": model_id,
            "name": config.set_name,
            "description": f"{config.title}: {shown.hook_point}, the {shown.site.name} model",
            "releaseName": config.release,
            **named,
            **creator,
        },
        "source": {
            "id": f"{shown.layer}-{config.set_name}",
            "modelId": model_id,
            "setName": config.set_name,
            "num_prompts": sizes.get("n_prompts_total"),
            "num_tokens_in_prompt": sizes.get("n_tokens_in_prompt"),
            "dataset": sizes.get("dataset"),
            **creator,
        },
    }


def _neuron(feature: Feature, key: Row, shown: ShownSite, config: HandoffConfig) -> Row:
    top = max((max(a["values"]) for a in feature["activations"]), default=0.0)
    return {
        **key,
        "sourceSetName": config.set_name,
        "creatorId": config.creator_id,
        "maxActApprox": top,
        "hasVector": True,
        "vector": feature["vector"],
        "vectorDefaultSteerStrength": top,
        "hookName": shown.site.hook_name,
        **{name: value for name, value in feature.items() if name not in _OWN_FIELDS},
    }


def _activations(feature: Feature, key: Row, creator_id: str) -> Iterator[Row]:
    for place, activation in enumerate(feature["activations"]):
        values = activation["values"]
        row = {
            **key,
            "tokens": activation["tokens"],
            "values": values,
            "maxValue": max(values),
            "maxValueTokenIndex": values.index(max(values)),
            "minValue": min(values),
            "binMin": activation["bin_min"],
            "binMax": activation["bin_max"],
            "binContains": activation["bin_contains"],
            "qualifyingTokenIndex": activation["qualifying_token_index"],
            "creatorId": creator_id,
        }
        yield _with_id(row, place)


def _with_id(row: Row, place: int = 0) -> Row:
    """25 characters, as theirs: imported twice, a row is there once."""
    content = json.dumps([row, place], sort_keys=True)
    return {"id": f"c{hashlib.sha256(content.encode()).hexdigest()[:24]}", **row}


def _write_rows(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Postgres has no NUL in text.
    lines = "".join(json.dumps(row, allow_nan=False).replace("\\u0000", " ") + "\n" for row in rows)
    content = lines.encode()
    # Without a time, so that the same rows are the same bytes.
    path.write_bytes(gzip.compress(content, 5, mtime=0) if path.suffix == ".gz" else content)
