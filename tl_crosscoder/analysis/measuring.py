"""`measure`: run the models over a held-out text once and measure everything.

Contract: every crosscoder collects sums, top tokens and counts while activations stream by; nothing
of size [tokens, d_sae] is kept. Limit: codes of `N_ROWS` tokens at a time are dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.activation_source import ActivationSource
from tl_crosscoder.activations.harvest import Harvested, harvest
from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.decoder_norms import (
    decoder_cosine,
    delta_norm,
    latent_class_ids,
    normalised_decoders,
    relative_decoder_norm,
)
from tl_crosscoder.analysis.example_collector import ExampleCollector, ExampleSettings
from tl_crosscoder.analysis.firing import FiringSums
from tl_crosscoder.analysis.latent_measures import NORMS, LatentMeasures
from tl_crosscoder.analysis.latent_scaling import ScalingSums
from tl_crosscoder.analysis.max_activating import TopTokens, examples
from tl_crosscoder.analysis.measurement import (
    LatentSummary,
    Measurement,
)
from tl_crosscoder.analysis.ranking import rank_latents
from tl_crosscoder.analysis.reconstruction import ReconstructionSums
from tl_crosscoder.crosscoder.checks import check_source
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.inference import N_ROWS, sparse_codes
from tl_crosscoder.site import compared_sites, site_parts


@torch.no_grad()
def measure(
    source: ActivationSource,
    crosscoder: Crosscoder,
    text: TokenizedText,
    *,
    n_top: int = 10,
    n_examples: int = 8,
    batch_size: int = 32,
    show_progress: bool = False,
) -> Measurement:
    """Run the models over a held-out text once and measure everything.

    Args:
        source: the models that the crosscoder was trained on, as a pair or any other source.
        crosscoder: for raw activations, as `Trainer.fit` and `Crosscoder.load` give it.
        text: text that training has not seen.
        n_top: latents to rank.
        n_examples: tokens in context for each of them.
        batch_size: contexts a forward pass.
        show_progress: with a progress bar.

    Raises:
        ValueError: the source's sites are not those of the crosscoder, or the text is empty.
    """
    return measure_all(
        source,
        [crosscoder],
        text,
        n_top=n_top,
        n_examples=n_examples,
        batch_size=batch_size,
        show_progress=show_progress,
    )[0]


@torch.no_grad()
def measure_all(
    source: ActivationSource,
    crosscoders: Sequence[Crosscoder],
    text: TokenizedText,
    *,
    n_top: int = 10,
    n_examples: int = 8,
    batch_size: int = 32,
    show_progress: bool = False,
) -> list[Measurement]:
    """`measure` of several crosscoders in one pass of the models."""
    passes = [_Pass.begin(source, c, text, n_examples=n_examples) for c in crosscoders]
    description = "Measuring" if show_progress else None
    n_contexts = 0
    for part in harvest(source, text, batch_size=batch_size, description=description):
        n_contexts += len(part.text)
        for one in passes:
            one.add(part)
    if n_contexts == 0:
        raise ValueError("there are no contexts to measure on: the text is empty.")
    return [one.result(source, text, n_top=n_top) for one in passes]


@dataclass(kw_only=True)
class _Pass:
    """What one crosscoder collects while the models run over a text."""

    crosscoder: Crosscoder
    norms: dict[str, Float[Tensor, " d_sae"]]
    examples: ExampleCollector
    firing: FiringSums
    scaling: ScalingSums | None
    context_size: int
    n_examples: int
    sums: ReconstructionSums | None = None

    @classmethod
    def begin(
        cls,
        source: ActivationSource,
        crosscoder: Crosscoder,
        text: TokenizedText,
        *,
        n_examples: int,
    ) -> "_Pass":
        check_source(source, crosscoder)
        device, d_sae = crosscoder.W_dec.device, crosscoder.cfg.d_sae
        return cls(
            crosscoder=crosscoder,
            norms=norm_measures(crosscoder),
            examples=ExampleCollector(
                d_sae,
                context_size=text.context_size,
                settings=ExampleSettings(n_top=max(n_examples, ExampleSettings.n_top)),
                device=device,
            ),
            firing=FiringSums.begin(n_sources=len(text.sources), d_sae=d_sae, device=device),
            scaling=ScalingSums.begin(crosscoder),
            context_size=text.context_size,
            n_examples=n_examples,
        )

    def add(self, part: Harvested) -> None:
        """Whole contexts, few enough that their dense codes fit."""
        class_ids = latent_class_ids(self.norms["delta_norm"])
        for piece in part.split(N_ROWS):
            x, text = piece.rows, piece.text
            codes = sparse_codes(self.crosscoder, x)
            batch = ReconstructionSums.of(x, codes, self.crosscoder, class_ids)
            self.sums = batch if self.sums is None else self.sums + batch
            self.examples.add(codes, piece.positions(self.context_size).to(x.device))
            self.firing.add(codes, text)
            if self.scaling is not None:
                self.scaling.add(site_parts(x, self.crosscoder.sites), codes)

    def result(self, source: ActivationSource, text: TokenizedText, *, n_top: int) -> Measurement:
        assert self.sums is not None
        sites, scaling = self.crosscoder.sites, self.scaling
        latents = LatentMeasures(
            firing=self.firing.result(text.sources),
            scaling=scaling.result() if scaling else {},
            difference=scaling.difference_by_latent() if scaling else None,
            **self.norms,
        )
        names = [s.name for s in sites]
        pair = compared_sites(sites)
        ranking = rank_latents(latents, n=n_top)
        collected = self.examples.result()
        top = TopTokens.of(collected, n=self.n_examples)
        return Measurement(
            reconstruction=self.sums.result(names),
            latents=latents,
            order=ranking.order,
            top=[
                LatentSummary(
                    ranked=row, examples=examples(top, row.latent, text, source.tokenizer)
                )
                for row in ranking.rows
            ],
            top_tokens=top,
            collected=collected,
            sources=text.sources,
            compared=pair and (names[pair[0]], names[pair[1]]),
        )


def norm_measures(crosscoder: Crosscoder) -> dict[str, Float[Tensor, " d_sae"]]:
    """The measures of `LatentMeasures` that compare two decoders."""
    decoders = normalised_decoders(crosscoder.W_dec, crosscoder.sites)
    if decoders is None:
        none = crosscoder.W_dec.new_full((crosscoder.cfg.d_sae,), torch.nan)
        return dict.fromkeys(NORMS, none)
    base, finetuned = (d.norm(dim=-1) for d in decoders)
    pair = compared_sites(crosscoder.sites)
    assert pair is not None
    encoders = (crosscoder.encoder(site).detach().T for site in pair)
    return {
        "relative_decoder_norm": relative_decoder_norm(base, finetuned),
        "delta_norm": delta_norm(base, finetuned),
        "decoder_cosine": decoder_cosine(*decoders),
        "encoder_cosine": decoder_cosine(*encoders),
    }
