"""The examples of a run, checked to be of the text that the run is measured on."""

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.diffing import EXAMPLES_NAME
from tl_crosscoder.run_folder import RunFolder


def examples_of(run: RunFolder, text: TokenizedText) -> ExampleDatabase:
    """Open a run's `examples.sqlite`; its contexts are then those of `text`.

    Raises:
        FileNotFoundError: the run has no examples.
        ValueError: they are of another text.
    """
    database = ExampleDatabase.open(run.path / EXAMPLES_NAME)
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
