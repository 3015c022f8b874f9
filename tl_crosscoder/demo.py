"""The demo: diff the embedded pair and say whether the planted difference was found.

The answer is known: an organism's suite entry says what was planted. Limit: two organisms, one
tiny base model; the figures show that the machinery works, not how it does on large models.
"""

from dataclasses import asdict, dataclass

from tl_crosscoder import files
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.config.presets import BatchTopK
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.documents import load_documents
from tl_crosscoder.data.text import held_out_text
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.pretrained import PREFIX
from tl_crosscoder.models.site import Site
from tl_crosscoder.organisms.recovery import Recovery, planted_recovery
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.report import sections
from tl_crosscoder.results.render import wrapped
from tl_crosscoder.run.training import train


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What the demo measured, and how it compares with what was planted."""

    organism: str
    planted: str
    measurement: Measurement
    recovery: Recovery
    sites: tuple[Site, ...]

    def __str__(self) -> str:
        """The tables that the command prints."""
        r = self.recovery
        shown = [f"{word} {n}" for word, n in r.in_context.items() if n]
        missing = [word for word, n in r.in_context.items() if not n]
        verdict = (
            f"{'Found' if r.is_found else 'NOT found'}. Planted words, and in the top contexts of "
            f"how many of these {len(r.latents)} latents they are: {', '.join(shown) or 'none'}."
            + (f" In none: {', '.join(missing)}." if missing else "")
        )
        return "\n".join(
            [
                sections.render(self.measurement, self.sites),
                "",
                wrapped(f"Planted: {self.planted}"),
                wrapped(verdict),
                f"  contexts with a planted word   {r.share_in_context:.0%}, "
                f"random latents {r.random_share_in_context:.0%}, p = {r.p_value:.2f} "
                "(this decides)",
                f"  tokens of a planted word       {r.share_at_token:.0%}, "
                f"random latents {r.random_share_at_token:.0%}",
            ]
        )


N_TOKENS = 1_000_000
"""Activation pairs that the demo trains on: about two minutes on two cores."""


def demo_config(name: str, *, output: str, seed: int = 0, n_tokens: int = N_TOKENS) -> RunConfig:
    """The run of the demo, as `tl-crosscoder train` would take it.

    Raises:
        ValueError: no such organism.
    """
    entry = organism(name)
    return RunConfig(
        base=PREFIX + "world-base",
        adapter=PREFIX + name,
        hook_name="blocks.2.hook_resid_post",
        text=entry.text,
        output=output,
        d_sae=1024,
        preset=BatchTopK(k=12),
        n_tokens=n_tokens,
        batch_size=1024,
        lr=2e-3,
        seed=seed,
    )


def run_demo(
    name: str, *, output: str, seed: int = 0, n_tokens: int = N_TOKENS, resume: bool = False
) -> DemoResult:
    """Train and measure a crosscoder on an embedded organism, and compare with what was planted.

    Raises:
        ValueError: no such organism, or an output folder that is in use.
    """
    config = demo_config(name, output=output, seed=seed, n_tokens=n_tokens)
    measurement = train(config, resume=resume).measurement()
    entry, source = organism(name), ModelPair.from_config(config)
    documents = load_documents(files.user_path(output) / files.HELD_OUT_NAME)
    text = held_out_text(config, documents, source.tokenizer, n_tokens=config.n_measured_tokens)
    recovery = planted_recovery(
        measurement, text, source.tokenizer, planted_words=entry.planted_words
    )
    files.write_json(files.user_path(output) / files.RECOVERY_NAME, asdict(recovery))
    return DemoResult(
        organism=name,
        planted=entry.planted,
        measurement=measurement,
        recovery=recovery,
        sites=source.sites,
    )
