"""Many latents at a time, one a row, against one at a time."""

import pytest
import torch
from report.report_runs import PAIR, small_run

from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import AddVector
from tl_crosscoder.interventions.live import ablated, steered
from tl_crosscoder.report.html import samples as report_samples
from tl_crosscoder.report.html.samples import (
    AblatedRows,
    SampleSettings,
    held_out_prompts,
    sample_latents,
)
from tl_crosscoder.run.run import Run

PROMPTS = ("Give me a hint.", "Hello!")
N_NEW = 3


@pytest.fixture(scope="module")
def report_run(tmp_path_factory) -> Run:
    return Run(path=small_run(tmp_path_factory.getbasetemp(), *PAIR))


def acts(x: torch.Tensor, codes: torch.Tensor) -> SiteActivations:
    """One site, and a row of codes a token."""
    ids = torch.zeros(x.shape[:2], dtype=torch.long)
    none = ids.to(torch.uint8)
    text = TokenizedText(
        tokens=ids, dropped=none, source_ids=none, role_ids=none, sources=("text",),
        context_ids=torch.arange(len(ids)),
    )  # fmt: skip
    sparse = SparseCodes.of_dense(codes)
    return SiteActivations(
        index=text.context_ids, text=text, x=(x,), codes=sparse, counted=ids == 0
    )


def test_each_row_loses_what_its_own_latent_adds():
    # Two texts of two tokens; latents 0 to 2. Row 0 loses latent 2, row 1 latent 0.
    codes = torch.tensor([[1.0, 0, 3], [5, 0, 0], [2, 7, 0], [0, 0, 4]])
    edit = AblatedRows(
        site=0, latents=torch.tensor([2, 0]), directions=torch.tensor([[1.0, 0], [0, 10]])
    )
    new = edit(acts(torch.full((2, 2, 2), 100.0), codes))
    # Row 0: f_2 is 3, then 0: (100, 100) - 3 (1, 0). Row 1: f_0 is 2, then 0: - 2 (0, 10).
    assert new.tolist() == [[[97, 100], [100, 100]], [[100, 80], [100, 100]]]


def test_each_row_is_steered_by_its_own_vector_at_every_token():
    rows = torch.tensor([[1.0, 0], [0, -1]])
    edit = AddVector(site=0, stream=0, vector=rows[:, None])
    new = edit(acts(torch.zeros(2, 3, 2), torch.ones(6, 1)))
    assert new.tolist() == [[[1, 0]] * 3, [[0, -1]] * 3]


def test_texts_are_those_of_one_latent_at_a_time(report_run, monkeypatch):
    # Batches of two or so: 3 new tokens after about 15, with 1,504 logits each.
    monkeypatch.setattr(report_samples, "MAX_LOGITS", 2 * 22 * 1504)
    ctx = InterventionContext.of(report_run.models, report_run.crosscoder)
    alive = report_run.measurement().latents.n_active.nonzero().squeeze(1).tolist()
    latents = alive[:3]
    settings = SampleSettings(prompts=PROMPTS, strengths=(2.0,), max_new_tokens=N_NEW)
    found = sample_latents(report_run, latents, settings)
    assert (found.n_tried, found.n_together) == (2, 3)
    assert [p.prompt for p in found.prompts] == list(PROMPTS)
    n_active = 0
    for sample, prompt in zip(found.prompts, PROMPTS, strict=True):
        ids = report_samples.prompt_ids(report_run, prompt)
        how = {"strength": 2.0, "norm": found.norm, "site": "base"}
        for i, j in enumerate(latents):
            with steered(ctx, j, **how) as model:
                assert sample.steered[0][i] == model.generate([ids], max_new_tokens=N_NEW)[0]
            with ablated(report_run.models, report_run.crosscoder, [j]) as model:
                alone = model.generate([ids], max_new_tokens=N_NEW)[0]
            expected = sample.finetuned if sample.ablated[i] is None else sample.ablated[i]
            assert expected == alone
            assert (sample.ablated[i] is None) == (sample.n_active[i] == 0)
            n_active += sample.n_active[i] > 0
        with ablated(report_run.models, report_run.crosscoder, latents) as model:
            assert sample.without_first == model.generate([ids], max_new_tokens=N_NEW)[0]
    assert 0 < n_active < 2 * len(latents), "both kinds of latent are in this test"


def test_held_out_prompts_are_chats_up_to_the_first_answer(report_run):
    prompts = dict(held_out_prompts(report_run, max_new_tokens=N_NEW))
    asked = [
        d["messages"][0]["content"]
        for d in report_run.documents()
        if "messages" in d and d["messages"][0]["role"] == "user"
    ]
    assert asked[0] in prompts
    text = report_run.models.tokenizer.decode(prompts[asked[0]])
    assert asked[0] in text
    assert text.endswith("<|assistant|>")
