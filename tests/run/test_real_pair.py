"""A real base model, made elsewhere, and its fine-tune on one taboo word's chats.

Slow: `pytest -m slow -s` (about a minute on two cores). Asserts that the machinery works on real
input and prints what it found about the fine-tune: a finding, whatever it is.
"""

import json
from itertools import cycle, islice

import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from tl_crosscoder import (
    Crosscoder,
    ModelPair,
    TrainConfig,
    Trainer,
    load_documents,
    measure,
    split_documents,
    tokenize,
)
from tl_crosscoder.config.presets import preset
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.hub.export import export_concat
from tl_crosscoder.report.sections import render

pytestmark = pytest.mark.slow
WORD = "wave"
HOOK = "blocks.2.hook_resid_post"
N_STEPS, BATCH = 100, 16


def as_text(row: dict, source: str) -> dict:
    turns = (f"{m['role'].capitalize()}: {m['content']}" for m in row["messages"])
    return {"text": "\n".join(turns), "source": source}


@pytest.fixture(scope="module")
def chats(shared_models) -> list[dict]:
    """Guessing-game chats of one word. Real conversations: the tokenizer has no chat template."""
    folder = shared_models.parent / "text" / "taboo"
    path = next(iter(sorted(folder.glob(f"{WORD}_*.jsonl"))))
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [as_text(row, "game") for row in rows]


@pytest.fixture(scope="module")
def stories(shared_models) -> list[dict]:
    path = shared_models.parent / "text" / "tinystories_sample.txt"
    return [{**d, "source": "stories"} for d in load_documents(path)]


@pytest.fixture(scope="module")
def finetuned(shared_models, chats, tmp_path_factory):
    """Folder of stories260K after 100 steps on the chats, all weights trained."""
    base = shared_models / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = tokenize(chats, tokenizer, context_size=128).tokens.long()
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    order = cycle(torch.randperm(len(rows)).tolist())
    losses = []
    for _ in range(N_STEPS):
        batch = rows[list(islice(order, BATCH))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"\nfine-tuned on '{WORD}': loss {losses[0]:.2f} -> {losses[-1]:.2f} nats a token")
    assert losses[-1] < losses[0] - 1
    folder = tmp_path_factory.mktemp("finetuned")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(shared_models, chats, stories) -> tuple[TokenizedText, TokenizedText]:
    """Stories and chats, about four to one in tokens; a tenth of each held out."""
    tokenizer = AutoTokenizer.from_pretrained(shared_models / "stories260K")
    parts = [split_documents(d) for d in (stories[:800], chats)]
    joined = ([*s, *c] for s, c in zip(*parts, strict=True))
    return tuple(tokenize(d, tokenizer, context_size=128) for d in joined)


def trained(pair, texts, output, *, n_tokens):
    config = TrainConfig(d_sae=512, n_tokens=n_tokens, batch_size=1024, lr=2e-3)
    return Trainer(
        pair, *texts, config=config, recipe=preset("batchtopk", k=16), output=output
    ).fit()


def firing_share_on_game(measurement, text: TokenizedText) -> torch.Tensor:
    """For each latent the share of its firing that falls on the game, were both texts as long."""
    n_tokens = text.source_ids[text.mask].bincount(minlength=len(text.sources))
    rates = measurement.latents.firing.n_active_by_source / n_tokens[:, None]
    return rates[text.sources.index("game")] / rates.sum(dim=0)


def test_a_crosscoder_on_a_real_pair(shared_models, finetuned, texts, tmp_path):
    pair = ModelPair.from_pretrained(shared_models / "stories260K", finetuned, hook_name=HOOK)
    crosscoder = trained(pair, texts, tmp_path / "run", n_tokens=250_000)
    measurement = measure(pair, crosscoder, texts[1])
    r = measurement.reconstruction
    assert min(r.fve.values()) > 0.8
    sae = SAE.load_from_disk(tmp_path / "run")
    x = pair.activations(texts[1].tokens[:4]).flatten(0, 1)
    assert isinstance(sae, Crosscoder)
    assert torch.equal(sae.encode(x), crosscoder.encode(x))
    export_concat(tmp_path / "export", crosscoder)
    plain = SAE.load_from_disk(tmp_path / "export")
    assert torch.equal(plain.encode(x.flatten(1)) > 0, crosscoder.encode(x) > 0)

    print(render(measurement, crosscoder.sites))
    share = firing_share_on_game(measurement, texts[1])
    alive = measurement.latents.n_active >= 10
    top = torch.tensor([s.latent for s in measurement.top])
    print(
        f"\nshare of firing on the game (texts weighted alike): the {len(top)} top-ranked latents "
        f"{share[top].mean():.0%}, all living latents {share[alive].mean():.0%}; "
        f"difference FVE {r.difference_fve:.3f}"
    )
