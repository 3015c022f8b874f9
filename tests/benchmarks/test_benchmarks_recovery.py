"""The benchmarks of recipes run at a tiny size; of their numbers only the form is looked at."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tl_crosscoder.config.presets import PRESETS, preset
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.models.site import Site
from tl_crosscoder.train.presets import recipe_of

pytestmark = pytest.mark.slow
DELTA_ABLATIONS = {"delta-unmasked", "delta-relative", "delta-relative-0.5", "delta-weight-1"}


def written_by(run: Callable[..., None], name: str, output: Path, *flags: str) -> dict:
    run(name, "--output", output, *flags)
    return json.loads(output.read_text())


def has_every_row(rows: list[dict], *, but: frozenset[str] = frozenset()) -> bool:
    return {r["variant"] for r in rows} >= (set(PRESETS) | DELTA_ABLATIONS) - but


@pytest.fixture(scope="module")
def planted(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("planted") / "rows.json"
    return written_by(run, "planted_features.py", output, "--worlds", "planted", "null")


@pytest.fixture(scope="module")
def organisms(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("organisms") / "rows.json"
    return written_by(run, "presets_on_organisms.py", output, "--organisms", "taboo")


def test_every_variant_has_a_row_in_every_world(planted):
    rows = {w: [r for r in planted["rows"] if r["world"] == w] for w in ("planted", "null")}
    assert has_every_row(rows["planted"])
    assert has_every_row(rows["null"], but=frozenset({"diff-sae"}))
    for row in planted["rows"]:
        assert all(math.isfinite(v) for v in row["reconstruction"]["fve"].values())
    assert {r["difference_fve"] for r in rows["null"]} == {None}


def test_planted_rows_count_features_by_kind(planted):
    rows = {(r["world"], r["variant"]): r for r in planted["rows"]}
    recovery = rows["planted", "batchtopk"]["recovery"]
    assert {kind: counts["n"] for kind, counts in recovery.items()} == {
        "base-only": 6,
        "finetuned-only": 6,
        "shared": 22,
        "rotated": 6,
        "rare finetuned-only": 1,
        "rare shared": 1,
    }
    assert all(0 <= c["recovered"] <= c["found"] <= c["n"] for c in recovery.values())
    assert list(rows["null", "delta"]["activations_by_part"]) == ["shared", "delta"]
    assert rows["planted", "diff-sae"]["claimed"] is None
    assert set(planted["coefficients"]) == {"l1", "l1-twice-l0", "jumprelu", "dsf"}


def test_a_result_file_runs_what_it_lacks_and_is_not_overwritten(run, tmp_path, capsys):
    from result_file import Column, ResultFile, collect

    path, calls = tmp_path / "rows.json", []

    def run(variant: str, seed: int) -> dict:
        calls.append((variant, seed))
        return {"l0": {"mean": 2.0 + seed}, "none": None}

    columns = [
        Column(heading="variant", path="variant", spec="", align="<"),
        Column(heading="L0", path="l0.mean"),
        Column(heading="no", path="none.x"),
    ]
    keys = [{"variant": "a", "seed": seed} for seed in (0, 1)]
    collect(ResultFile(path, {"k": 4}, resume=False), columns, keys[:1], run)
    written = json.loads(path.read_text())["rows"]
    assert written == [{"variant": "a", "seed": 0, "l0": {"mean": 2.0}, "none": None}]
    with pytest.raises(ValueError, match=r"already has 1 rows\. Go on with --resume"):
        ResultFile(path, {"k": 4}, resume=False)
    with pytest.raises(ValueError, match=r"rows made with \{'k': 4\}, not \{'k': 5\}"):
        ResultFile(path, {"k": 5}, resume=True)
    capsys.readouterr()
    collect(ResultFile(path, {"k": 4}, resume=True), columns, keys, run)
    assert calls == [("a", 0), ("a", 1)]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Of 2 and 3 the mean is 2.5.
    assert lines[1:3] == [["a", "2.000", "-"], ["a", "3.000", "-"]]
    assert lines[4] == ["a", "2.500", "-"]


def test_every_variant_has_a_row_on_an_organism(organisms):
    rows = {r["variant"]: r for r in organisms["rows"]}
    assert has_every_row(organisms["rows"])
    assert len(rows) == len(organisms["rows"])
    for row in rows.values():
        assert all(math.isfinite(v) for v in row["reconstruction"]["fve"].values())
        assert math.isfinite(row["difference_fve"])
        assert 0 < row["recovery"]["p_value"] <= 1
    assert list(rows["delta"]["difference_fve_by_part"]) == ["shared", "delta"]
    assert rows["diff-sae"]["latents_per_class"] is None


def crosscoder_of(rows: torch.Tensor) -> Crosscoder:
    """With these decoder rows, `[d_sae, 2, d_model]`."""
    sites = tuple(
        Site(name=n, d_model=rows.shape[-1], hook_name="", model_name="")
        for n in ("base", "finetuned")
    )
    crosscoder = Crosscoder(CrosscoderConfig(d_in=2 * rows.shape[-1], d_sae=len(rows), sites=sites))
    crosscoder.W_dec.data = rows.flatten(1)
    return crosscoder


def test_a_dictionary_of_the_planted_features_recovers_all_of_them(run):
    from planted_recovery import claimed_finetuned_only, planted_recovery
    from planted_world import planted_world

    world = planted_world("planted", 0)
    # Longer, in another order, and one latent more: base-only feature 0 written to the fine-tuned
    # site with the sign that a difference has, -v, as a recipe with tied latents has to.
    feature = world.directions[0]
    cancels = torch.stack([torch.zeros_like(feature[0]), -feature[0]])[None]
    crosscoder = crosscoder_of(torch.cat([3 * world.directions.flip(0), cancels]))
    is_living = torch.ones(41, dtype=torch.bool)
    recovery = planted_recovery(world, crosscoder, is_living)
    assert all(c["recovered"] == c["found"] == c["n"] for c in recovery.values())
    claimed = claimed_finetuned_only(world, crosscoder, is_living)
    assert claimed == {"n": 7, "n_false": 1, "n_along_a_difference": 1}
    is_living[-2] = False  # of the flipped ones the last: base-only feature 0
    assert planted_recovery(world, crosscoder, is_living)["base-only"]["recovered"] == 5


def test_a_tied_latent_never_meets_a_rotated_feature(run):
    from planted_recovery import planted_recovery
    from planted_world import planted_world

    world = planted_world("planted", 0)
    # Cosine of (m, m) with (v^0, v^1), m between them: ((1 + 0.6) / 2) ** 0.5 = 0.894 < 0.9.
    tied = world.directions.mean(dim=1, keepdim=True).expand(-1, 2, -1)
    recovery = planted_recovery(world, crosscoder_of(tied), torch.ones(40, dtype=torch.bool))
    assert recovery["rotated"]["mean_cosine"] == pytest.approx(0.8**0.5, abs=1e-3)
    assert recovery["rotated"]["found"] == 0
    assert recovery["shared"]["recovered"] == 22


def test_parts_of_the_difference_add_up_where_they_share_nothing(run):
    from difference_parts import difference_parts
    from planted_world import planted_world

    from tl_crosscoder.crosscoder.partition import Partition, placed

    world = planted_world("planted", 0)
    crosscoder = crosscoder_of(world.directions)
    # Codes of 0.5 on every row: what is said is constant, so that each part explains nothing.
    crosscoder.b_enc.data.fill_(0.5)
    crosscoder.W_enc.data.zero_()
    parts = placed((Partition(name="exclusive", share=0.3), Partition(name="both", share=0.7)), 40)
    sums = difference_parts(crosscoder, [world.rows(100, stream=0)], parts)
    result = sums.result(crosscoder, parts)
    assert result["difference_fve_by_part"] == pytest.approx({"exclusive": 0, "both": 0}, abs=1e-6)
    assert result["activations_by_part"] == pytest.approx({"exclusive": 0.3, "both": 0.7})
    # An exclusive feature has ||v^1 - v^0|| = 1, a shared one 0, a rotated one 2 - 2 * 0.6 = 0.8.
    contribution = sums.contribution(crosscoder)
    expected = [0.25] * 12 + [0] * 22 + [0.25 * 0.8] * 6
    torch.testing.assert_close(contribution.float(), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_two_ablations_of_delta_are_presets():
    def made_of(name, **options):
        return recipe_of(preset(name, **options), n_steps=10)

    assert made_of("delta", dual_k=False) == made_of("delta-competing")
    assert made_of("delta", delta_loss_weight=0.0).partitions == made_of("dual-k").partitions
