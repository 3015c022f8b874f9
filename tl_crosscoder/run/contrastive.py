"""A file of contrastive texts: load the models, sample, and go on after a kill.

Contract: the .jsonl grows by whole batches; a run that goes on cuts the last batch there off (a
kill may have left half of it), samples it again, and ends with the bytes of an undisturbed run on
the same device. The .json beside it holds the settings, and at the end the counts.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_crosscoder import files
from tl_crosscoder.config.text import ContrastiveConfig, TextSource
from tl_crosscoder.data.contrastive import (
    PromptBatches,
    Sampling,
    batch_prompts,
    default_prompts,
    sample_batch,
    say_left_out,
)
from tl_crosscoder.data.documents import Document, stream_documents
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import tokenizer_sha256
from tl_crosscoder.run.sources import sites_of

_ANY_HOOK = "blocks.0.hook_resid_post"
_FREE = ("output", "hook_name", "difference", "device")
"""Fields that say nothing of the texts, or not which: a run may go on on another device."""


def write_contrastive(config: ContrastiveConfig, *, resume: bool = False) -> Path:
    """Sample what `config` says into `config.output`, one row a text; the path of the file.

    Args:
        config: models, prompts and sampling.
        resume: go on with the file that is there, of the same settings.

    Raises:
        ValueError, FileNotFoundError: an output that is there already or of other settings,
            prompts or models that cannot be used, or no prompt that gave texts.
    """
    path = Path(config.output)
    _check_output(path, resume=resume)
    prompts = None if config.prompts is None else _read_prompts(config)
    source = _load_source(config)
    if prompts is None:
        is_chat = bool(source.tokenizer.chat_template)
        prompts = default_prompts(config.n_prompts, is_chat=is_chat)
    batched = batch_prompts(
        source,
        prompts,
        max_new_tokens=config.max_new_tokens,
        max_prompt_tokens=config.max_prompt_tokens,
        batch_size=config.batch_size,
    )
    record = _claimed(path, _record(config, source, batched))
    if not record["is_complete"]:
        _write_rows(path, config, source, batched)
        record |= _counts(path, batched) | {"is_complete": True}
        files.write_json(record_path(path), record)
    say_left_out(batched, n_pairs=record["n_pairs"])
    if not record["n_pairs"]:
        raise ValueError(
            f"none of the {batched.n_prompts:,} prompts gave texts: after each, a model stopped at "
            "once. Give other prompts: chats for chat models, beginnings of text for others."
        )
    return path


def record_path(path: Path) -> Path:
    """Where the settings and counts of a file of contrastive texts are."""
    return path.with_suffix(".json")


def describe_contrastive(path: str | Path) -> str:
    """A paragraph for a reader: how many texts, how long, and one prompt with its texts.

    Raises:
        ValueError, FileNotFoundError: no complete file of contrastive texts.
    """
    path = Path(path)
    record = _read_record(path)
    if not record["is_complete"]:
        raise ValueError(f"{path} is not complete. Go on with resume (--resume).")
    lines = [f"{record['n_pairs']:,} prompts with a text of each model in {path}"]
    lines += [
        f"  {site:<12} {mean:8.1f} new tokens on average"
        for site, mean in record["mean_new_tokens"].items()
    ]
    if not record["n_pairs"]:
        return lines[0]
    example = _example(path, n_sites=len(record["mean_new_tokens"]))
    lines += ["", f"Example, after {example[0]['prompt']!r}:"]
    lines += [f"  {row['origin']:<12} {_short(row['completion'])!r}" for row in example]
    return "\n".join(lines)


def _example(path: Path, *, n_sites: int) -> list[dict[str, Any]]:
    """The rows of the first prompt, among 100, after which the models differ; else of the first."""
    rows = _rows(path)
    groups = [g for _ in range(100) if (g := list(islice(rows, n_sites)))]
    differing = (g for g in groups if len({row["completion"] for row in g}) > 1)
    return next(differing, groups[0])


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


# --- what goes in ---------------------------------------------------------------------------------


def _load_source(config: ContrastiveConfig) -> ModelPair:
    hook_name = (config.hook_name or _ANY_HOOK).split(",")[0]
    return ModelPair.from_sites(
        sites_of(replace(config, hook_name=hook_name, difference=False)),
        device=config.device,
        dtype=config.dtype,
        merge_adapter=config.merge_adapter,
    )


def _read_prompts(config: ContrastiveConfig) -> list[Document]:
    where = TextSource(
        text=str(config.prompts),
        text_column=config.prompts_column,
        dataset_config=config.dataset_config,
        dataset_split=config.dataset_split,
    )
    prompts = list(islice(stream_documents(where, seed=config.seed), config.n_prompts))
    if not prompts:
        raise ValueError(
            f"there is no prompt in {config.prompts!r}: every document is empty or whitespace. "
            "Give a file of texts or chats, or none for the built-in prompts."
        )
    return prompts


# --- the file and its record ----------------------------------------------------------------------


def _check_output(path: Path, *, resume: bool) -> None:
    """Refuse an output that may not be written, before any long work."""
    if path.suffix != ".jsonl":
        raise ValueError(f"output is {str(path)!r}; it is a file to write, and ends in .jsonl.")
    there = next((p for p in (path, record_path(path)) if p.exists()), None)
    if there is None:
        return
    if not resume:
        raise ValueError(
            f"{there} is there already. Choose another output, or go on with it with resume "
            "(--resume)."
        )
    _read_record(path)


def _read_record(path: Path) -> dict[str, Any]:
    where = record_path(path)
    if not where.is_file():
        raise FileNotFoundError(
            f"there is no {where} beside {path}, which says how contrastive texts were made. Give "
            "a file that `tl-crosscoder contrastive` wrote, or another output."
        )
    try:
        record = json.loads(where.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON ({error}). Choose another output.") from error
    if not isinstance(record, dict) or not {"settings", "is_complete"} <= record.keys():
        raise ValueError(f"{where} is no record of contrastive texts. Choose another output.")
    return record


def _record(config: ContrastiveConfig, source: ModelPair, batched: PromptBatches) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE}
    settings["temperature"] = float(config.temperature)
    settings["prompts_sha256"] = batched.sha256
    settings["tokenizer_sha256"] = tokenizer_sha256(source.tokenizer)
    return {"settings": settings, "sites": [s.label for s in source.sites], "is_complete": False}


def _claimed(path: Path, planned: dict[str, Any]) -> dict[str, Any]:
    """The record to go on with: the one there, if it is of the same settings."""
    there = _read_record(path) if record_path(path).exists() else planned
    differing = sorted(files.differences(there["settings"], planned["settings"]))
    if differing:
        raise ValueError(
            f"{path} was begun with other settings: {', '.join(differing)}. Resume with the same, "
            "or choose another output."
        )
    n_bytes = path.stat().st_size if path.exists() else 0
    if there["is_complete"] and there["n_bytes"] == n_bytes:
        return there
    files.write_json(record_path(path), planned)
    return planned


def _write_rows(
    path: Path, config: ContrastiveConfig, source: ModelPair, batched: PromptBatches
) -> None:
    first = _cut_last_batch(path) if path.exists() else 0
    sites = tuple(site.name for site in source.sites)
    sampling = Sampling(
        max_new_tokens=config.max_new_tokens, temperature=config.temperature, seed=config.seed
    )
    bar = tqdm(
        total=batched.n_prompts,
        initial=sum(map(len, batched.batches[:first])),
        desc="Sampling",
        unit="prompt",
        disable=None,
    )
    with bar, path.open("ab") as file:
        for i, batch in islice(enumerate(batched.batches), first, None):
            for row in sample_batch(source, batch, i, sites=sites, sampling=sampling):
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            bar.update(len(batch))


def _cut_last_batch(path: Path) -> int:
    """Cut off the last batch there and half a line after it; the number of that batch."""
    start = end = batch = 0
    for number, own in groupby(_whole_lines(path), key=lambda line: _parsed(line, path)["batch"]):
        batch, start = number, end
        end += sum(map(len, own))
    os.truncate(path, start)
    return batch


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _parsed(line: bytes, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return {**row, "batch": int(row["batch"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} holds a line that is no contrastive text ({line[:60]!r}): it was edited or is "
            "damaged. Choose another output."
        ) from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return (_parsed(line, path) for line in _whole_lines(path))


def _counts(path: Path, batched: PromptBatches) -> dict[str, Any]:
    """Prompts with texts, mean lengths of the completions, and prompts left out."""
    n_texts: Counter[str] = Counter()
    n_new: Counter[str] = Counter()
    for row in _rows(path):
        n_texts[row["origin"]] += 1
        n_new[row["origin"]] += len(row["input_ids"]) - row["n_prompt_tokens"]
    n_pairs = max(n_texts.values(), default=0)
    return {
        "n_prompts": batched.n_prompts + batched.n_too_long,
        "n_pairs": n_pairs,
        "n_too_long": batched.n_too_long,
        "n_empty": batched.n_prompts - n_pairs,
        "mean_new_tokens": {site: n_new[site] / n for site, n in n_texts.items()},
        "n_bytes": path.stat().st_size,
    }
