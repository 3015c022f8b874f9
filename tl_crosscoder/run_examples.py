"""The examples of a run: opened, or collected where the folder has none.

Limit: examples are of the run's held-out text alone.
"""

import sys

from tqdm.auto import tqdm

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.measuring import measure
from tl_crosscoder.diffing import EXAMPLES_NAME, save_examples
from tl_crosscoder.run_folder import RunFolder


def run_examples(run: RunFolder) -> ExampleDatabase:
    """Examples of a run; collected now, on its held-out text, where its folder has none.

    Published dictionaries come without them. The measures in the folder stay as they are.

    Raises:
        FileNotFoundError: the run keeps no text either.
    """
    path = run.path / EXAMPLES_NAME
    if not path.is_file():
        source, contexts = run.measured()
        tqdm.write(f"Collecting examples on held-out text, once, into {path}.", file=sys.stderr)
        found = measure(source, run.crosscoder, contexts, show_progress=True)
        save_examples(found, run.path, text=contexts, tokenizer=source.tokenizer)
    return ExampleDatabase.open(path)


def examples_of(run: RunFolder, text: TokenizedText) -> ExampleDatabase:
    """Examples of a run, checked to be of the text that it is measured on.

    Raises:
        FileNotFoundError: the run has neither examples nor text.
        ValueError: they are of another text.
    """
    database = run_examples(run)
    for j in database.latents()[:1]:
        (example,) = database.latent(j, n=1)
        stored = database.context(example.context).token_ids
        context = text.tokens[example.context].tolist() if example.context < len(text) else []
        if list(stored) != context[: len(stored)]:
            database.close()
            raise ValueError(
                f"the examples in {run.path} are of another text than the run is measured on now. "
                "Make them again with `tl-crosscoder analyze --fresh`."
            )
    return database
