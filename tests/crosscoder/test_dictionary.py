import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dictionaries import D_MODEL, new_training, planted, randomised
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from safetensors.torch import load_file, save_file

from tl_crosscoder import L1, BatchTopK, Crosscoder
from tl_crosscoder.hub.export import export_concat


@pytest.fixture(params=["batchtopk", "l1"])
def crosscoder(request) -> Crosscoder:
    sparsity = L1() if request.param == "l1" else BatchTopK(k=4)
    training = randomised(new_training(sparsity=sparsity))
    training.calibrate_threshold_([planted(500)])
    made = training.to_inference()
    made.fold_site_scales_([2.0, 0.5])
    return made


X = planted(50, seed=3)


def test_per_site_matrices_are_views(crosscoder):
    with torch.no_grad():
        crosscoder.decoder("finetuned")[0] = 7.0
        crosscoder.encoder("base")[0, 0] = 8.0
        crosscoder.decoder_bias(1)[0] = 9.0
    assert (crosscoder.W_dec[0, D_MODEL:] == 7).all()
    assert crosscoder.W_enc[0, 0] == 8
    assert crosscoder.b_dec[D_MODEL] == 9
    assert crosscoder.decoder("base").shape == (32, D_MODEL)
    with pytest.raises(ValueError, match=r"'other' is not in this crosscoder; .*'base'"):
        crosscoder.decoder("other")


def test_stacked_and_flat_input_give_the_same(crosscoder):
    assert torch.equal(crosscoder.encode(X), crosscoder.encode(X.flatten(1)))
    assert torch.equal(crosscoder(X).flatten(1), crosscoder(X.flatten(1)))
    assert crosscoder(X[:, None]).shape == (50, 1, 2, D_MODEL)
    with pytest.raises(ValueError, match=r"shape \[50, 5\] do not fit"):
        crosscoder.encode(torch.zeros(50, 5))


def test_a_single_site_keeps_the_shape_of_its_input():
    training = new_training(D_MODEL)
    training.threshold.fill_(0.1)
    sae = training.to_inference()
    x = X[:, 0]
    assert sae.encode(x[:1]).shape == (1, 32)
    assert sae(x[:, None]).shape == (50, 1, D_MODEL)
    assert torch.equal(sae.encode(x[:, None])[:, 0], sae.encode(x))


def test_the_code_is_the_formula(crosscoder):
    pre = X[:, 0] @ crosscoder.encoder("base") + X[:, 1] @ crosscoder.encoder("finetuned")
    pre = pre + crosscoder.b_enc
    codes = pre * (pre > crosscoder.threshold) * (pre > 0)
    torch.testing.assert_close(crosscoder.encode(X), codes, atol=1e-5, rtol=1e-5)
    x_hat = codes @ crosscoder.decoder(1) + crosscoder.decoder_bias(1)
    torch.testing.assert_close(crosscoder(X)[:, 1], x_hat, atol=1e-4, rtol=1e-4)


def test_folding_decoder_norms_leaves_outputs_unchanged(crosscoder):
    before, active = crosscoder(X), crosscoder.encode(X) > 0
    with torch.no_grad():
        crosscoder.W_dec.mul_(torch.rand(32, 1) + 0.5)
    before = crosscoder(X)
    crosscoder.fold_W_dec_norm()
    torch.testing.assert_close(crosscoder(X), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(crosscoder.encode(X) > 0, active)
    torch.testing.assert_close(crosscoder.decoder_norms().sum(dim=-1), torch.ones(32))


@pytest.mark.parametrize("sparsity", [L1(), BatchTopK(k=4)])
def test_the_saved_dictionary_does_on_raw_activations_what_training_did_on_scaled_ones(sparsity):
    training = randomised(new_training(sparsity=sparsity))
    training.calibrate_threshold_([planted(500)])
    training.eval()
    scales = torch.tensor([[3.0], [0.25]])
    made = training.to_inference()
    made.fold_site_scales_([3.0, 0.25])
    raw = X / scales
    torch.testing.assert_close(made(raw) * scales, training(X).view_as(X), atol=1e-4, rtol=1e-4)
    assert torch.equal(made.encode(raw) > 0, training.encode(X) > 0)
    # Norms are read in the space of training, where each latent's norms now sum to 1.
    ratio = training.decoder_norms()[:, 1] / training.decoder_norms()[:, 0]
    torch.testing.assert_close(made.decoder_norms()[:, 1] / made.decoder_norms()[:, 0], ratio)
    assert [s.scale for s in made.sites] == [3.0, 0.25]


def test_save_and_load_give_equal_bits(crosscoder, tmp_path):
    crosscoder.save(tmp_path / "d")
    again = Crosscoder.load(tmp_path / "d")
    assert again.cfg.sites == crosscoder.cfg.sites
    for name, tensor in crosscoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert torch.equal(again.encode(X), crosscoder.encode(X))


def test_saelens_loads_it_from_disk_as_a_crosscoder(crosscoder, tmp_path):
    crosscoder.save(tmp_path / "d")
    sae = SAE.load_from_disk(tmp_path / "d")
    assert isinstance(sae, Crosscoder)
    assert sae.sites == crosscoder.sites
    assert torch.equal(sae.encode(X), crosscoder.encode(X))
    sae.save_model(tmp_path / "saved by saelens")
    assert torch.equal(Crosscoder.load(tmp_path / "saved by saelens").W_dec, crosscoder.W_dec)


def hub_cache(root: Path, repo: str) -> Path:
    """The folder of a repository in a Hugging Face cache, where a file is a file of the repo."""
    folder = root / ("models--" + repo.replace("/", "--"))
    commit = "0" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    return folder / "snapshots" / commit


OFFLINE_LOAD = """
import sys, torch
from sae_lens import SAE
if sys.argv[2] == "plugin":
    import tl_crosscoder
sae = SAE.from_pretrained("somebody/crosscoders", "taboo/layer_2")
x = torch.load(sys.argv[1], weights_only=True)
torch.save(sae.encode(x), sys.argv[1] + ".codes")
print(type(sae).__name__, "tl_crosscoder" in sys.modules)
"""


@pytest.mark.parametrize("how", ["plugin", "no plugin"])
def test_saelens_loads_it_from_a_local_hub_cache(crosscoder, tmp_path, how):
    """In a fresh process: with this package as a Crosscoder; the export without it, exactly."""
    folder = hub_cache(tmp_path / "hub", "somebody/crosscoders") / "taboo" / "layer_2"
    if how == "plugin":
        crosscoder.save(folder)
    else:
        export_concat(folder, crosscoder)
    inputs = tmp_path / "x.pt"
    torch.save(X.flatten(1), inputs)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", OFFLINE_LOAD, str(inputs), how],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    expected = "Crosscoder True" if how == "plugin" else "JumpReLUSAE False"
    assert out.stdout.strip().endswith(expected), out.stderr
    codes = torch.load(f"{inputs}.codes", weights_only=True)
    assert torch.equal(codes > 0, crosscoder.encode(X) > 0)
    torch.testing.assert_close(codes, crosscoder.encode(X))


def test_the_export_keeps_the_sites_in_its_metadata(crosscoder, tmp_path):
    export_concat(tmp_path / "d", crosscoder)
    sae = SAE.load_from_disk(tmp_path / "d")
    assert type(sae) is JumpReLUSAE
    assert [s["name"] for s in sae.cfg.metadata.sites] == ["base", "finetuned"]
    with pytest.raises(ValueError, match=r"architecture 'jumprelu', not 'tl_crosscoder'"):
        Crosscoder.load(tmp_path / "d")


def test_folders_that_are_no_dictionary_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Crosscoder.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json and no sae_weights"):
        Crosscoder.load(tmp_path)
    (tmp_path / "cfg.json").write_text("[1, 2")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not a JSON object"):
        Crosscoder.load(tmp_path)


def test_a_truncated_weights_file_is_refused(crosscoder, tmp_path):
    weights = crosscoder.save(tmp_path / "d") / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or does not belong"):
        Crosscoder.load(tmp_path / "d")


def test_weights_of_another_size_and_fields_that_are_not_known_are_refused(crosscoder, tmp_path):
    path = crosscoder.save(tmp_path / "d") / "cfg.json"
    cfg = json.loads(path.read_text())
    path.write_text(json.dumps(cfg | {"d_sae": 31}))
    with pytest.raises(ValueError, match="truncated or does not belong"):
        Crosscoder.load(tmp_path / "d")
    cfg["sites"][0]["new"] = 1
    path.write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=r"argument 'new'\): it is damaged, or of a newer version"):
        Crosscoder.load(tmp_path / "d")


def test_a_device_that_is_not_there_is_not_called_a_damaged_file(crosscoder, tmp_path):
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        Crosscoder.load(crosscoder.save(tmp_path / "d"), device="cuda:99")


def test_weights_with_nan_are_refused(crosscoder, tmp_path):
    path = crosscoder.save(tmp_path / "d") / "sae_weights.safetensors"
    weights = load_file(path)
    weights["b_dec"][3] = torch.nan
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"NaN or infinity in \['b_dec'\]"):
        Crosscoder.load(tmp_path / "d")


def test_a_bfloat16_crosscoder_is_saved_as_float32():
    training = new_training(dtype="bfloat16")
    assert training.to_inference().W_dec.dtype == torch.float32


def test_its_representation_names_models_and_hooks(crosscoder):
    assert "finetuned: tiny-finetuned blocks.1.hook_resid_post [12]" in repr(crosscoder)
