"""A whole harvest: load the models, read the text, write the cache.

Limit: on one process; the held-out share of the documents is at the end of the cache.
"""

from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from tl_crosscoder.config.training import HarvestConfig
from tl_crosscoder.data.cache import ActivationCache
from tl_crosscoder.data.cache_writer import check_cache_folder, write_cache
from tl_crosscoder.run.sources import load_source, sites_of
from tl_crosscoder.run.text import check_text, text_of_harvest


def run_harvest(config: HarvestConfig, *, resume: bool = False) -> ActivationCache:
    """Harvest what `config` says into `config.output`.

    Raises:
        ValueError, FileNotFoundError: bad input or too small a disk, before any long work; nothing
            is overwritten.
    """
    output = Path(config.output)
    check_cache_folder(output, resume=resume)
    sites_of(config)
    check_text(config)
    source = load_source(config)
    text = text_of_harvest(config, source)
    tqdm.write(f"Text: {text.training.describe()}")
    return write_cache(
        source,
        text.training,
        text.held_out,
        output,
        store=config.store,
        shard_tokens=config.shard_tokens,
        batch_size=config.harvest_batch_size,
        made_with=asdict(config),
        resume=resume,
    )
