"""Every stored file of another library gives that library's own codes and reconstructions."""

import os
from pathlib import Path

import pytest
import torch
from models.tiny_pairs import CORPUS, save_model
from safetensors.torch import load_file, save_file

from tl_crosscoder import Crosscoder, ModelPair, measure, tokenize
from tl_crosscoder.cli.hub import Import
from tl_crosscoder.hub.convert import convert
from tl_crosscoder.hub.publish import plan_publication
from tl_crosscoder.models.site import Site

HOOK = "blocks.1.hook_resid_pre"
NAMES = {"base": "org/base", "finetuned": "org/sft", "hook_name": HOOK}
FORMATS = [
    "dictionary_learning/batchtopk",
    "dictionary_learning/batchtopk-normalized",
    "dictionary_learning/l1",
    "ckkissane/blocks.1.hook_resid_pre",
    "crosscode/relu",
    "crosscode/jumprelu",
]


@pytest.fixture(scope="module")
def formats() -> Path:
    root = Path(__file__).parents[2]
    shared = Path(os.environ.get("TL_CROSSCODER_SHARED", root.parent / "shared"))
    folder = shared / "data/formats"
    if not folder.is_dir():
        pytest.skip(f"no dictionaries of other libraries at {folder}: set TL_CROSSCODER_SHARED")
    return folder


def test_every_stored_folder_is_tested(formats):
    found = [p.parent.relative_to(formats) for p in formats.rglob("reference.safetensors")]
    assert sorted(map(str, found)) == sorted(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_reconstructions_are_the_other_librarys_own(formats, name, tmp_path):
    reference = load_file(formats / name / "reference.safetensors")
    crosscoder = convert(formats / name, **NAMES)
    again = Crosscoder.load(crosscoder.save(tmp_path / "d"))
    for each in (crosscoder, again):
        codes, x_hat = each.encode(reference["x"]), each(reference["x"])
        assert 0 < (codes > 0).float().mean() < 0.7
        assert torch.equal(codes > 0, reference["codes"] > 0)
        torch.testing.assert_close(codes, reference["codes"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x_hat, reference["reconstruction"], rtol=1e-5, atol=2e-6)
    assert [(s.name, s.model_name, s.hook_name) for s in again.sites] == [
        ("base", "org/base", HOOK),
        ("finetuned", "org/sft", HOOK),
    ]
    assert again.cfg.metadata.imported_from["library"] == name.split("/")[0]


@pytest.mark.parametrize("name", FORMATS[:3])
def test_folding_gives_their_scaled_codes_and_norms_are_theirs(formats, name):
    """n_j is of the space they trained in, which the sites' scales lead back to."""
    reference = load_file(formats / name / "reference.safetensors")
    crosscoder = convert(formats / name, **NAMES)
    norms = crosscoder.decoder_norms().T
    torch.testing.assert_close(norms, reference["decoder_norms"], rtol=1e-5, atol=1e-6)
    crosscoder.fold_W_dec_norm()
    codes = crosscoder.encode(reference["x"])
    torch.testing.assert_close(codes, reference["scaled_codes"], rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(
        crosscoder(reference["x"]), reference["reconstruction"], rtol=1e-5, atol=5e-6
    )


def test_the_stored_mean_is_subtracted(formats):
    """FVU 0.01 with it and 16 without, where the sites are far from zero."""
    folder = formats / "dictionary_learning/batchtopk-normalized"
    x = load_file(folder / "reference.safetensors")["x"]
    crosscoder = convert(folder, **NAMES)
    variance = (x - x.mean(dim=0)).pow(2).sum()
    assert (x - crosscoder(x)).pow(2).sum() < 0.02 * variance
    assert crosscoder.sites[0].scale == pytest.approx(0.7432921528816223)
    assert crosscoder.sites[1].scale == pytest.approx(0.2973768413066864)


def test_names_are_taken_from_the_files_and_what_is_missing_is_asked_for(formats):
    folder = formats / "ckkissane" / HOOK
    crosscoder = convert(folder, finetuned="org/sft")
    assert [(s.model_name, s.hook_name) for s in crosscoder.sites] == [
        ("tiny", HOOK),
        ("org/sft", HOOK),
    ]
    with pytest.raises(ValueError, match=r"2 sites name {'base': 'tiny', 'hook_name': .*exactly"):
        convert(folder)
    with pytest.raises(ValueError, match=r"name no models; .*name the base model"):
        convert(formats / "crosscode/relu")
    with pytest.raises(ValueError, match=r"holds 2 sites of width 24, but these were named"):
        convert(formats / "crosscode/relu", **NAMES | {"finetuned": "org/sft,org/rl"})
    wide = [Site(name=n, hook_name=HOOK, model_name=n, d_model=25) for n in ("a", "b")]
    with pytest.raises(ValueError, match="of width 24, but these were named"):
        convert(formats / "crosscode/relu", sites=wide)


def test_scales_that_stay_outside_a_file_are_folded_in(formats):
    """Codes of raw x with scales are those of x times scales without."""
    folder, scales = formats / "ckkissane" / HOOK, (0.5, 3.0)
    x = load_file(folder / "reference.safetensors")["x"]
    plain = convert(folder, finetuned="org/sft")
    scaled = convert(folder, finetuned="org/sft", scales=scales)
    by_site = torch.tensor(scales)[:, None]
    torch.testing.assert_close(scaled.encode(x), plain.encode(x * by_site))
    torch.testing.assert_close(scaled(x), plain(x * by_site) / by_site)
    assert [s.scale for s in scaled.sites] == [0.5, 3.0]
    for wrong in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match="give one above 0 for each of the 2 sites"):
            convert(folder, finetuned="org/sft", scales=wrong)
    with pytest.raises(ValueError, match="folded in already"):
        convert(formats / FORMATS[1], **NAMES, scales=(1.0, 2.0))


def test_what_was_imported_is_measured_and_published(formats, tmp_path, monkeypatch, capsys):
    """By the commands and the lines of docs/sharing.md, with random models of the file's width."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "finetuned")):
        save_model(tmp_path / name, seed=seed, hidden_size=24, head_dim=6)
    how = {"base": "base", "finetuned": "finetuned", "hook_name": HOOK}
    Import(source=str(formats / "crosscode/jumprelu"), output="imported", **how)()
    assert "imported holds a crosscoder of crosscode: d_sae=96" in capsys.readouterr().out

    crosscoder = Crosscoder.load("imported")
    assert "measure it in Python first" in "".join(
        plan_publication("imported", "a/b", licence=None).warnings
    )
    models = ModelPair.from_sites(crosscoder.sites)
    documents = [{"text": text} for text in CORPUS * 4]
    text = tokenize(documents, models.tokenizer, context_size=12)
    measurement = measure(models, crosscoder, text)
    measurement.save("imported")
    assert measurement.reconstruction.n_tokens == text.n_tokens
    plan = plan_publication("imported", "a/b", licence="mit")
    assert f"| FVE base | {measurement.reconstruction.fve['base']:.3f} |" in plan.text(
        "imported/README.md"
    )
    assert not [w for w in plan.warnings if "the card has no" in w]


def test_a_named_weights_file_is_read_with_the_config_beside_it(formats, tmp_path):
    """As their training leaves them: 3.pt with 3_cfg.json, beside other versions."""
    folder = formats / "ckkissane" / HOOK
    for version in ("3", "4"):
        (tmp_path / f"{version}.pt").write_bytes((folder / "cc_weights.pt").read_bytes())
        text = (folder / "cfg.json").read_text().replace('"tiny"', f'"tiny-{version}"')
        (tmp_path / f"{version}_cfg.json").write_text(text)
    with pytest.raises(ValueError, match=r"several weights files, \['3.pt', '4.pt'\]: name one"):
        convert(tmp_path, finetuned="org/sft")
    found = convert(tmp_path / "4.pt", finetuned="org/sft")
    assert found.sites[0].model_name == "tiny-4"
    assert found.cfg.metadata.imported_from["name"] == "4.pt"


def test_nan_is_refused(formats, tmp_path):
    tensors = load_file(formats / FORMATS[2] / "model.safetensors")
    tensors["decoder.weight"][0, 0, 0] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds NaN or infinity in \['W_dec'\]"):
        convert(tmp_path, **NAMES)
