"""Exports where this package cannot be imported: exact, or as near as their card says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models.random_models import hooked_pair, random_crosscoder
from models.tiny_pairs import CORPUS, HOOK, save_model
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from tl_crosscoder import Crosscoder, ModelPair, load_documents, tokenize
from tl_crosscoder.cli.hub import Export
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.hub.export import (
    export_concat,
    export_site,
    export_transcoder,
    one_model_sae,
)
from tl_crosscoder.interventions.base_estimate import BaseEstimate
from tl_crosscoder.models.site import Site

FIXTURE = Path(__file__).parent / "fixtures/0.1.0/batchtopk"


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> ModelPair:
    return hooked_pair(tmp_path_factory.mktemp("tokenizer"), ("org/base", "org/sft"))


@pytest.fixture(scope="module")
def texts(pair):
    """(to fit on, to measure on): 12 tokens a context."""
    documents = [{"text": f"{text} {i}"} for i in range(20) for text in CORPUS]
    text = tokenize(documents, pair.tokenizer, context_size=12)
    n = len(text) // 2
    return text[:n], text[n:]


def dictionary(sites, **changes) -> Crosscoder:
    return random_crosscoder(sites, 40, scale=0.3, **changes)


def inputs(crosscoder: Crosscoder, n: int = 300) -> Tensor:
    return torch.randn(n, crosscoder.cfg.d_in, generator=torch.Generator().manual_seed(7))


LOAD = """
import json, sys
sys.modules["tl_crosscoder"] = None  # as if it were not installed
from safetensors.torch import load_file, save_file
from sae_lens import SAE

for folder in sys.argv[1:]:
    sae = SAE.load_from_disk(folder)
    x = load_file(folder + ".x.safetensors")["x"]
    codes = sae.encode(x)
    found = {"codes": codes, "x_hat": sae.decode(codes)}
    save_file({n: t.detach() for n, t in found.items()}, folder + ".out.safetensors")
    print(json.dumps([folder, type(sae).__name__, sae.cfg.metadata.export["kind"]]))
"""


class Expected:
    """What each export must give, by its folder; inputs lie beside the folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found: dict[str, dict[str, Tensor]] = {}

    def all_of(self, name: str, crosscoder: Crosscoder, x: Tensor, *, source, fit_on, measure_on):
        """Every export of a crosscoder, with what it itself makes of raw activations."""
        codes = crosscoder.encode(x)
        self._add(export_concat(self.root / f"{name}-concat", crosscoder), x, codes, crosscoder(x))
        for site, at in (("base", 0), ("finetuned", 1)):
            folder = self.root / f"{name}-{site}"
            export_transcoder(folder, crosscoder, site=None if at else site)
            # Another order of products than the crosscoder's own, of a block of its columns.
            x_hat = codes @ crosscoder.decoder(at) + crosscoder.decoder_bias(at)
            self._add(folder, x, codes, x_hat)
            torch.testing.assert_close(x_hat, crosscoder(x).chunk(2, dim=-1)[at])
        folder, own = self.root / f"{name}-site", x.chunk(2, dim=-1)[1]
        export_site(folder, crosscoder, source=source, fit_on=fit_on, measure_on=measure_on)
        sae = one_model_sae(crosscoder, BaseEstimate.fit(source, fit_on))
        self._add(folder, own, sae.encode(own), sae(own))

    def _add(self, folder: Path, x: Tensor, codes: Tensor, x_hat: Tensor) -> None:
        assert 0 < (codes > 0).float().mean() < 0.6
        save_file({"x": x.contiguous()}, f"{folder}.x.safetensors")
        self.found[str(folder)] = {"codes": codes.detach(), "x_hat": x_hat.detach()}


def embedded_exports(expected: Expected) -> None:
    """Of a dictionary of each organism and each preset, on a little of their text."""
    for organism, preset in (("taboo", "batchtopk"), ("false-fact", "delta")):
        pair = ModelPair.from_pretrained(
            "tl_crosscoder/world-base",
            adapter=f"tl_crosscoder/{organism}",
            hook_name="blocks.2.hook_resid_post",
        )
        documents = load_documents(f"tl_crosscoder/{organism}", max_documents=40)
        text = tokenize(documents, pair.tokenizer, context_size=64)
        crosscoder = Crosscoder.from_pretrained(f"tl_crosscoder-{organism}", preset)
        how = {"source": pair, "fit_on": text[8:24], "measure_on": text[:8]}
        expected.all_of(f"{organism}-{preset}", crosscoder, pair.rows(text[:8]).flatten(1), **how)


@pytest.mark.slow
def test_sae_lens_alone_gives_the_same_latents(pair, texts, tmp_path):
    """Of every export, in one process without this package."""
    expected = Expected(tmp_path)
    for with_bias in (False, True):
        crosscoder = dictionary(pair.sites, apply_b_dec_to_input=with_bias)
        how = {"source": pair, "fit_on": texts[0], "measure_on": texts[1]}
        expected.all_of(f"bias-{with_bias}", crosscoder, inputs(crosscoder), **how)
    embedded_exports(expected)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *expected.found],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    classes = {"concat": "JumpReLUSAE", "transcoder": "JumpReLUTranscoder", "site": "JumpReLUSAE"}
    assert [folder for folder, _, _ in said] == [*expected.found]
    assert all(classes[kind] == cls for _, cls, kind in said)
    for name, exact in expected.found.items():
        found = load_file(f"{name}.out.safetensors")
        assert torch.equal(found["codes"] > 0, exact["codes"] > 0), name
        # A bias folded into b_enc is rounded once more.
        torch.testing.assert_close(found["codes"], exact["codes"], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found["x_hat"], exact["x_hat"], atol=5e-6, rtol=1e-5)
        if "bias-False" in name or "concat" in name:
            assert torch.equal(found["codes"], exact["codes"]), name


def test_the_estimate_is_folded_by_hand():
    """Widths 1: W = (2, 3), b_enc = -1 and x^0 = 0.5 x^1 + 1.

    x^1 = 4: pre = 2 * 3 + 3 * 4 - 1 = 17, and folded (2 * 0.5 + 3) 4 + (2 * 1 - 1) = 17. With a
    bias (10, 20) taken off the input: 17 - 2 * 10 - 3 * 20 = -63, and for x^1 = 24: pre =
    2 * (13 - 10) + 3 * (24 - 20) - 1 = 17.
    """
    sites = tuple(
        Site(name=n, d_model=1, hook_name=HOOK, model_name=n) for n in ("base", "finetuned")
    )
    estimate = BaseEstimate(
        weight=torch.tensor([[0.5]]), bias=torch.tensor([1.0]), sites=sites,
        base=0, finetuned=1, ridge=1.0, n_tokens=2,
    )  # fmt: skip
    weights = {
        "W_enc": torch.tensor([[2.0], [3.0]]),
        "W_dec": torch.tensor([[7.0, 0.25]]),
        "b_enc": torch.tensor([-1.0]),
        "b_dec": torch.tensor([10.0, 20.0]),
        "threshold": torch.tensor([16.0]),
    }
    for with_bias, x in ((False, 4.0), (True, 24.0)):
        cfg = CrosscoderConfig(d_in=2, d_sae=1, sites=sites, apply_b_dec_to_input=with_bias)
        crosscoder = Crosscoder(cfg)
        crosscoder.load_state_dict(weights)
        sae = one_model_sae(crosscoder, estimate)
        x = torch.tensor([[x]])
        assert sae.encode(x).item() == 17.0
        assert sae(x).item() == 17.0 * 0.25 + 20.0
        assert sae.encode(x - 0.5).item() == 0.0  # 15, below the threshold
        assert torch.equal(sae.encode(x), crosscoder.encode(torch.cat([0.5 * x + 1, x], dim=1)))


@pytest.mark.parametrize("site", [None, "base"])
def test_the_card_says_what_was_measured(pair, texts, site, tmp_path):
    """Against sums over the dense codes of all tokens."""
    crosscoder, (fit_on, measure_on) = dictionary(pair.sites), texts
    folder = tmp_path / "site"
    found = export_site(
        folder, crosscoder, source=pair, fit_on=fit_on, measure_on=measure_on, site=site
    )
    at = 0 if site == "base" else 1
    x = pair.rows(measure_on)
    own = x[:, at]
    sae = SAE.load_from_disk(folder)
    exact, active = crosscoder.encode(x) > 0, sae.encode(own) > 0
    both, either = (exact & active).sum().item(), (exact | active).sum().item()
    variance = (own - own.mean(dim=0)).pow(2).sum()
    assert found.n_tokens == len(x) == measure_on.n_tokens
    assert found.jaccard == pytest.approx(both / either)
    assert found.precision == pytest.approx(both / active.sum().item())
    assert found.recall == pytest.approx(both / exact.sum().item())
    assert found.l0 == pytest.approx(active.sum().item() / len(x))
    assert found.fvu == pytest.approx(((own - sae(own)).pow(2).sum() / variance).item(), rel=1e-4)
    error = (x - crosscoder(x))[:, at].pow(2).sum()
    assert found.fvu_of_crosscoder == pytest.approx((error / variance).item(), rel=1e-4)
    assert 0.1 < found.jaccard < 0.999
    card = (folder / "README.md").read_text()
    assert "**Approximate.**" in card
    assert f"jaccard {found.jaccard:.3f}" in card
    assert f"| fraction of variance unexplained | {found.fvu:.4f} | " in card
    assert sae.cfg.metadata.hook_name == HOOK
    assert sae.cfg.metadata.model_name == ("org/base" if site else "org/sft")


def test_sites_of_unequal_width_have_transcoders_and_site_exports(pair, texts, tmp_path):
    base, finetuned = pair.models
    hooks = {"a": HOOK, "b": "blocks.1.mlp.hook_post", "c": HOOK}
    sites = [Site(name=n, hook_name=h, model_name="m") for n, h in hooks.items()]
    models = ModelPair(base, base, finetuned, sites=sites)
    crosscoder = dictionary(models.sites)
    export_transcoder(tmp_path / "b", crosscoder, site="b")
    x = inputs(crosscoder)
    found = SAE.load_from_disk(tmp_path / "b")
    torch.testing.assert_close(found(x), crosscoder(x)[:, 16:48])
    two = ModelPair(base, base, sites=sites[:2])
    with pytest.raises(ValueError, match=r"no other site is as wide as 'b', .* as transcoder"):
        export_site(
            tmp_path / "x", dictionary(two.sites), source=two, fit_on=texts[0], measure_on=texts[1]
        )
    quality = export_site(
        tmp_path / "c", crosscoder, source=models, fit_on=texts[0], measure_on=texts[1]
    )
    assert [*quality.estimate_fve] == ["a", "b"]
    assert SAE.load_from_disk(tmp_path / "c").cfg.d_in == 16


def test_thresholds_are_never_rounded(pair, tmp_path):
    """A bfloat16 dictionary is written in float32, a float64 one as it is."""
    for dtype, written in (("bfloat16", "float32"), ("float64", "float64")):
        crosscoder = dictionary(pair.sites).to(getattr(torch, dtype))
        folder = export_concat(tmp_path / dtype, crosscoder)
        assert json.loads((folder / "cfg.json").read_text())["dtype"] == written
        threshold = load_file(folder / "sae_weights.safetensors")["threshold"]
        assert str(threshold.dtype) == f"torch.{written}"
        assert torch.equal(threshold, crosscoder.threshold.to(threshold))


def test_names_cannot_write_the_card(pair, tmp_path):
    hostile = "x`|</td><script>alert(1)</script>\n# Title"
    sites = [Site(name=n, d_model=4, hook_name=HOOK, model_name=hostile) for n in ("a", "b")]
    card = (export_concat(tmp_path / "d", dictionary(sites)) / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("| x_0")]
    assert "`x'\\|</td><script>alert(1)</script> # Title`" in line
    assert line.count("`") == 6  # name, model, hook: code spans, in which nothing is HTML


def test_what_cannot_be_exported_is_refused(pair, texts, tmp_path):
    crosscoder = dictionary(pair.sites)
    (tmp_path / ".tmpnotes").write_text("")
    single = dictionary(pair.sites[:1])
    how = {"source": pair, "fit_on": texts[0], "measure_on": texts[1]}
    with pytest.raises(ValueError, match="not an empty folder"):
        export_concat(tmp_path, crosscoder)
    with pytest.raises(ValueError, match="not an empty folder"):
        export_site(tmp_path, crosscoder, **how)
    with pytest.raises(ValueError, match="site 'sft' is not in this crosscoder"):
        export_transcoder(tmp_path / "d", crosscoder, site="sft")
    with pytest.raises(ValueError, match="is an SAE of it already: export it as concat"):
        export_transcoder(tmp_path / "d", single)
    with pytest.raises(ValueError, match="trained on"):
        export_site(tmp_path / "d", single, **how)
    assert [p.name for p in tmp_path.iterdir()] == [".tmpnotes"]


def test_the_verb_writes_what_python_writes(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Export(dictionary="tl_crosscoder/taboo-delta", output="embedded")()
    assert [p.name for p in tmp_path.iterdir()] == ["embedded"]  # no copy of the run is needed
    folder = dictionary(pair.sites).save(tmp_path / "d")
    Export(dictionary=str(folder), output=str(tmp_path / "t"), to="transcoder", site="base")()
    assert "is the dictionary, exactly" in capsys.readouterr().out
    assert SAE.load_from_disk(tmp_path / "t").cfg.metadata.export["site"] == "base"
    useless = {"to": "concat", "site": "base"}, {"to": "transcoder", "text": "x"}, {"device": "mps"}
    for wrong in useless:
        with pytest.raises(ValueError, match="is of no use to --to"):
            Export(dictionary=str(folder), output=str(tmp_path / "x"), **wrong)()
    with pytest.raises(FileNotFoundError, match="is not a run"):
        Export(dictionary=str(folder), output=str(tmp_path / "x"), to="site")()


def test_the_verb_fits_a_site_on_one_half_of_a_text_and_measures_on_the_other(
    tmp_path, capsys, monkeypatch
):
    """On a run as version 0.1.0 left it, whose models are called base and finetuned."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "finetuned")):
        save_model(tmp_path / name, seed=seed, hidden_size=8, head_dim=2, intermediate_size=16)
    saved = Crosscoder.load(FIXTURE)
    del saved.cfg.metadata.tokenizer_sha256  # of the library that made its tokenizer then
    saved.save(tmp_path / "run")
    shutil.copy(FIXTURE / "runner_cfg.json", tmp_path / "run")
    documents = [{"text": f"{text} {i}"} for i in range(30) for text in CORPUS]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, documents)))
    Export(dictionary="run", output="site", to="site", text="text.jsonl")()
    about = SAE.load_from_disk("site").cfg.metadata.export
    n, n_fitted = about["quality"]["n_tokens"], about["n_fitted"]
    tokenizer = AutoTokenizer.from_pretrained("base")
    assert n + n_fitted == tokenize(documents, tokenizer, context_size=16).n_tokens
    assert n == pytest.approx(n_fitted, rel=0.05)
    assert f"On {n:,} other tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="not an empty folder"):
        Export(dictionary="run", output="site", to="site", text="text.jsonl")()
