"""A file of contrastive texts: load the models, sample, and resume after a kill.

The .jsonl grows by whole batches, and the .json beside it holds the settings, the counts and how
much was written. A resumed run cuts off what a kill left of an unfinished batch and ends with the
bytes of an undisturbed run. Limit: on the same kind of device; other devices sample other texts.
"""

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.config.inputs import ContrastiveConfig, TextSource
from tl_crosscoder.data.contrastive import ContrastiveSampler, default_prompts
from tl_crosscoder.data.documents import Document, stream_documents
from tl_crosscoder.locks import locked
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import ANY_HOOK
from tl_crosscoder.models.tokenizer import tokenizer_sha256
from tl_crosscoder.progress import progress

_FREE = ("output", "hook_name", "difference", "device")
"""Fields that may differ when a run is resumed: they do not change which texts are sampled."""


def write_contrastive(config: ContrastiveConfig, *, resume: bool = False) -> Path:
    """Sample the texts of `config` into `config.output`, one row a text; the path of the file.

    Args:
        config: models, prompts and sampling.
        resume: continue the file of the same settings that is there.

    Raises:
        ValueError, FileNotFoundError: an output that exists already or has other settings,
            prompts or models that cannot be used, or no prompt that gave texts; or another process
            writes to the output.
    """
    path = files.user_path(config.output)
    with locked(path, is_file=True):
        _check_output(path, resume=resume)
        _sample_into(path, config)
    return path


def _sample_into(path: Path, config: ContrastiveConfig) -> None:
    """Load the models, and sample what a file that may be written to does not have."""
    prompts = None if config.prompts is None else _read_prompts(config)
    source = _load_source(config)
    sampler = ContrastiveSampler(
        source,
        prompts or default_prompts(config.n_prompts, is_chat=bool(source.tokenizer.chat_template)),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        batch_size=config.batch_size,
        seed=config.seed,
        max_prompt_tokens=config.max_prompt_tokens,
    )
    record = _claimed(path, config, sampler)
    _write_rows(path, sampler, record)
    sampler.say_dropped(n_pairs=record["n_pairs"])
    if not record["n_pairs"]:
        raise ValueError(
            f"none of the {sampler.n_prompts:,} prompts gave texts: after each, a model stopped at "
            "once. Give other prompts: chats for chat models, beginnings of text for others."
        )


def describe_contrastive(path: str | Path) -> str:
    """How many texts a file holds, how long they are, and one prompt with its texts.

    Raises:
        ValueError, FileNotFoundError: no complete file of contrastive texts.
    """
    path = files.user_path(path)
    record = _read_record(path)
    if not record["is_complete"]:
        raise ValueError(f"{path} is not complete. Continue it with resume (--resume).")
    n_pairs, n_new = record["n_pairs"], record["n_new_tokens"]
    lines = [f"{n_pairs:,} prompts with a text of each model in {path}"]
    if not n_pairs:
        return lines[0]
    lines += [f"  {site:<12} {n / n_pairs:8.1f} new tokens on average" for site, n in n_new.items()]
    example = _example(path, n_sites=len(n_new))
    lines += ["", f"Example, after {example[0]['prompt']!r}:"]
    for row in example:
        text = row["completion"]
        shown = text if len(text) <= 200 else f"{text[:200]}…"
        lines.append(f"  {row['origin']:<12} {shown!r}")
    return "\n".join(lines)


def _example(path: Path, *, n_sites: int) -> list[dict[str, Any]]:
    """Rows of the first of 100 prompts whose completions differ, or of the very first."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in islice(file, 100 * n_sites)]
    groups = [rows[start : start + n_sites] for start in range(0, len(rows), n_sites)]
    differing = (g for g in groups if len({row["completion"] for row in g}) > 1)
    return next(differing, groups[0])


def _load_source(config: ContrastiveConfig) -> ModelPair:
    hook_name = (config.hook_name or ANY_HOOK).split(",")[0]
    return ModelPair.from_config(replace(config, hook_name=hook_name, difference=False))


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


# --- the file and the record beside it ------------------------------------------------------------


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _check_output(path: Path, *, resume: bool) -> None:
    """Refuse an output that may not be written, before any long work."""
    if path.suffix != ".jsonl":
        raise ValueError(f"output is {str(path)!r}; it must be a file that ends in .jsonl.")
    existing = next((p for p in (path, _record_path(path)) if p.exists()), None)
    if existing is not None and not resume and not _is_only_begun(path):
        raise ValueError(
            f"{existing} exists already. Choose another output, or continue it with resume "
            "(--resume)."
        )
    if existing is not None:
        _read_record(path)


def _is_only_begun(path: Path) -> bool:
    """Whether nothing was written yet but the record, as where memory did not suffice."""
    try:
        return _read_record(path)["n_batches"] == 0
    except (FileNotFoundError, ValueError, KeyError):  # not ours
        return False


def _read_record(path: Path) -> dict[str, Any]:
    """What the .json says. Raises FileNotFoundError or ValueError unless it fits the .jsonl."""
    where = _record_path(path)
    if not where.is_file():
        raise FileNotFoundError(
            f"there is no {where} beside {path}, which says how contrastive texts were made. Give "
            "a file that `tl-crosscoder contrastive` wrote, or another output."
        )
    record = files.read_json(where)
    if not isinstance(record, dict) or not {"settings", "n_bytes"} <= record.keys():
        raise ValueError(f"{where} is not a record of contrastive texts. Choose another output.")
    n_bytes = path.stat().st_size if path.exists() else 0
    # A kill leaves bytes of an unfinished batch after those of the record, and never fewer.
    if n_bytes < record["n_bytes"] or (record["is_complete"] and n_bytes > record["n_bytes"]):
        raise ValueError(
            f"{path} has {n_bytes:,} bytes, but {record['n_bytes']:,} were written: it was edited "
            "or is damaged. Choose another output."
        )
    return record


def _claimed(path: Path, config: ContrastiveConfig, sampler: ContrastiveSampler) -> dict[str, Any]:
    """The record to continue with: a new one, or the existing one of the same settings."""
    files.sweep(path.parent, of=_record_path(path).name)
    settings = {k: v for k, v in asdict(config).items() if k not in _FREE}
    settings["temperature"] = float(config.temperature)
    settings["prompts_sha256"] = sampler.prompts_sha256()
    settings["tokenizer_sha256"] = tokenizer_sha256(sampler.source.tokenizer)
    if not _record_path(path).exists() or _is_only_begun(path):
        record = {
            "settings": settings,
            "models": {site.name: site.label for site in sampler.source.sites},
            "is_complete": False,
            "n_prompts": sampler.n_prompts + sampler.n_too_long,
            "n_too_long": sampler.n_too_long,
            "n_batches": 0,
            "n_bytes": 0,
            "n_pairs": 0,
            "n_new_tokens": dict.fromkeys(sampler.sites, 0),
        }
        files.write_json(_record_path(path), record)
        return record
    record = _read_record(path)
    files.check_same(record["settings"], settings, what=f"{path} was begun with other settings")
    return record


def _write_rows(path: Path, sampler: ContrastiveSampler, record: dict[str, Any]) -> None:
    """Sample the batches that the record does not have, and keep count in it."""
    n_done = record["n_batches"]
    bar = progress(
        total=sampler.n_prompts,
        initial=sum(map(len, sampler.batches[:n_done])),
        desc="Sampling",
        unit="prompt",
    )
    with bar, path.open("ab") as file:
        file.truncate(record["n_bytes"])
        for batch in range(n_done, len(sampler.batches)):
            rows = sampler.sample(batch)
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                n_new = len(row["input_ids"]) - row["n_prompt_tokens"]
                record["n_new_tokens"][row["origin"]] += n_new
            # Rows first: the record never names bytes that are not there.
            file.flush()
            record["n_pairs"] += len(rows) // len(sampler.sites)
            record |= {"n_batches": batch + 1, "n_bytes": file.tell()}
            record["is_complete"] = batch + 1 == len(sampler.batches)
            files.write_json(_record_path(path), record)
            bar.update(len(sampler.batches[batch]))
