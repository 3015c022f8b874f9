"""The trained dictionary: its formula, its views, its files, and what it refuses."""

import copy
import io
import json
import pickle

import pytest
import torch
from dictionaries import D_MODEL, new_training, planted, randomised, sites
from sae_lens import SAE
from sae_lens.saes import sae as sae_lens_sae
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from safetensors.torch import load_file, save_file

from tl_crosscoder import L1, BatchTopK, Crosscoder
from tl_crosscoder.crosscoder import crosscoder as inference
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.crosscoder.crosscoder import sparse_codes
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.hub.export import export_concat

X = planted(50, seed=3)


@pytest.fixture(params=["batchtopk", "l1"])
def training(request):
    made = randomised(new_training(sparsity=L1() if request.param == "l1" else BatchTopK(k=4)))
    made.calibrate_threshold_([planted(500)])
    return made


@pytest.fixture
def crosscoder(training) -> Crosscoder:
    made = training.to_inference()
    made.fold_site_scales_([2.0, 0.5])
    return made


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
    assert "finetuned: tiny-finetuned blocks.1.hook_resid_post [12]" in repr(crosscoder)


def test_stacked_and_flat_input_give_the_same(crosscoder):
    assert torch.equal(crosscoder.encode(X), crosscoder.encode(X.flatten(1)))
    assert torch.equal(crosscoder(X).flatten(1), crosscoder(X.flatten(1)))
    assert crosscoder(X[:, None]).shape == (50, 1, 2, D_MODEL)
    with pytest.raises(ValueError, match=r"shape \[50, 5\] do not fit"):
        crosscoder.encode(torch.zeros(50, 5))


def test_a_single_site_keeps_the_shape_of_its_input():
    training = new_training(D_MODEL)
    training.threshold.fill_(0.1)
    sae, x = training.to_inference(), X[:, 0]
    assert sae.encode(x[:1]).shape == (1, 32)
    assert sae(x[:, None]).shape == (50, 1, D_MODEL)
    assert torch.equal(sae.encode(x[:, None])[:, 0], sae.encode(x))


def test_the_code_is_the_formula(crosscoder):  # spec: C1 C3
    pre = X[:, 0] @ crosscoder.encoder("base") + X[:, 1] @ crosscoder.encoder("finetuned")
    pre = pre + crosscoder.b_enc
    codes = pre * (pre > crosscoder.threshold) * (pre > 0)
    torch.testing.assert_close(crosscoder.encode(X), codes, atol=1e-5, rtol=1e-5)
    x_hat = codes @ crosscoder.decoder(1) + crosscoder.decoder_bias(1)
    torch.testing.assert_close(crosscoder(X)[:, 1], x_hat, atol=1e-4, rtol=1e-4)


def test_folding_decoder_norms_leaves_outputs_unchanged(crosscoder):  # spec: C4
    active = crosscoder.encode(X) > 0
    with torch.no_grad():
        crosscoder.W_dec.mul_(torch.rand(32, 1) + 0.5)
    before = crosscoder(X)
    crosscoder.fold_W_dec_norm()
    torch.testing.assert_close(crosscoder(X), before, atol=1e-4, rtol=1e-4)
    assert torch.equal(crosscoder.encode(X) > 0, active)
    torch.testing.assert_close(crosscoder.decoder_norms().sum(dim=-1), torch.ones(32))


def test_on_raw_activations_it_does_what_training_did_on_scaled_ones(training):  # spec: C4
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


@pytest.mark.parametrize("options", [{}, {"apply_b_dec_to_input": True}])
@pytest.mark.parametrize("n_rows", [7, 4096])
def test_sparse_codes_are_the_entries_of_encode_to_the_bit(options, n_rows, monkeypatch):
    monkeypatch.setattr(inference, "N_ROWS", n_rows)
    made = Crosscoder(CrosscoderConfig(d_in=12, d_sae=40, sites=sites(6, 6), **options))
    generator = torch.Generator().manual_seed(0)
    state = made.state_dict().items()
    made.load_state_dict({n: torch.randn(t.shape, generator=generator) for n, t in state})
    assert (made.threshold < 0).any()
    x = torch.randn(20, 2, 6, generator=generator)
    with torch.no_grad():
        codes = torch.cat([made.encode(rows) for rows in x.split(n_rows)])
    found = sparse_codes(made, x)
    assert torch.equal(found.to_dense(), codes)
    assert (found.values > 0).all()
    assert found.batch == 20
    none = sparse_codes(made, x[:0])
    assert (none.batch, len(none.values)) == (0, 0)


def test_some_entries_and_sums_of_rows():
    codes = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [3.0, 0.0, 4.0]])
    sparse = SparseCodes.of_dense(codes)
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    # 2 (0, 1) + 1 (1, 1) = (1, 3); nothing; 3 (1, 0) + 4 (1, 1) = (7, 4).
    assert sparse.times(rows).tolist() == [[1, 3], [0, 0], [7, 4]]
    large = sparse.where(sparse.values > 1.5)
    assert large.to_dense().tolist() == [[0, 2, 0], [0, 0, 0], [3, 0, 4]]


def test_saelens_loads_both_forms_from_a_local_hub_cache(crosscoder, tmp_path, monkeypatch):
    """A file of the cache is a file of the repository."""  # spec: C12
    folder = tmp_path / "models--somebody--crosscoders"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    crosscoder.save(folder / "snapshots" / ("0" * 40) / "ours" / "layer_2")
    export_concat(folder / "snapshots" / ("0" * 40) / "plain", crosscoder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(sae_lens_sae, "get_pretrained_saes_directory", dict)  # reads YAML for 10 s
    for name, kind in (("ours/layer_2", Crosscoder), ("plain", JumpReLUSAE)):
        sae = SAE.from_pretrained("somebody/crosscoders", name)
        assert type(sae) is kind
        assert torch.equal(sae.encode(X.flatten(1)), crosscoder.encode(X))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_another_dtype_it_takes_the_same_activations(crosscoder, tmp_path, dtype):
    by_name = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}[dtype]
    made = getattr(copy.deepcopy(crosscoder), by_name)()
    assert made.encode(X).dtype == made.dtype == dtype
    # A rounded threshold moves a code across it here and there.
    assert (made(X).float() - crosscoder(X)).norm() < 0.1 * crosscoder(X).norm()
    again = Crosscoder.load(made.save(tmp_path / "d"))
    assert torch.equal(again(X), made(X))
    assert torch.equal(made.float()(X).float(), again.float()(X))


def test_a_pickled_dictionary_is_the_dictionary(crosscoder):
    file = io.BytesIO()
    torch.save(crosscoder, file)
    file.seek(0)
    copies = (
        pickle.loads(pickle.dumps(crosscoder)),
        torch.load(file, weights_only=False),
        copy.deepcopy(crosscoder),
    )
    for made in copies:
        assert made.sites == crosscoder.sites
        assert torch.equal(made(X), crosscoder(X))
        assert made.cfg.to_dict() == crosscoder.cfg.to_dict()
        with torch.no_grad():
            made.W_dec.zero_()
    assert crosscoder.W_dec.any()


def test_a_dictionary_larger_than_the_memory_is_refused_by_its_bytes(crosscoder, tmp_path):
    # (2 * 24 + 2) * 2e12 * 4 bytes = 400,000 GB, and four times that in training.
    large = {"d_in": 2 * D_MODEL, "d_sae": 2 * 10**12, "sites": crosscoder.sites}
    said = "takes 400,000.0 GB, but cpu has .* Choose a d_sae .* below"
    with pytest.raises(ValueError, match=said):
        Crosscoder(CrosscoderConfig(**large))
    with pytest.raises(ValueError, match=r"1,600,000\.0 GB with gradients and moments"):
        new_training(d_sae=large["d_sae"])
    path = crosscoder.save(tmp_path / "d") / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"d_sae": large["d_sae"]}))
    with pytest.raises(ValueError, match="truncated or does not belong"):  # nor is it allocated
        Crosscoder.load(tmp_path / "d")


def test_the_export_keeps_the_sites_in_its_metadata(crosscoder, tmp_path):
    export_concat(tmp_path / "d", crosscoder)
    sae = SAE.load_from_disk(tmp_path / "d")
    assert type(sae) is JumpReLUSAE
    assert [s["name"] for s in sae.cfg.metadata.sites] == ["base", "finetuned"]
    with pytest.raises(ValueError, match=r"architecture 'jumprelu', not 'tl_crosscoder'"):
        Crosscoder.load(tmp_path / "d")


def test_folders_that_are_not_a_dictionary_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        Crosscoder.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no cfg\.json and no sae_weights"):
        Crosscoder.load(tmp_path)
    (tmp_path / "cfg.json").write_text("[1, 2")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cfg.json is not JSON"):
        Crosscoder.load(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda cfg: [cfg],
        lambda _: 3,
        lambda _: None,
        lambda cfg: cfg | {"sites": 3},
        lambda cfg: cfg | {"sites": [3, 4]},
        lambda cfg: cfg | {"sites": [s | {"hook_name": 0} for s in cfg["sites"]]},
        lambda cfg: cfg | {"sites": [s | {"d_model": "12"} for s in cfg["sites"]]},
        lambda cfg: cfg | {"sites": [s | {"minus": [1]} for s in cfg["sites"]]},
        lambda cfg: cfg | {"metadata": [1]},
        lambda cfg: cfg | {"dtype": {}},
    ],
)
def test_a_config_of_another_shape_is_refused_with_its_path(damage, tmp_path):
    cfg = CrosscoderConfig(d_in=2 * D_MODEL, d_sae=8, sites=sites())
    folder = Crosscoder(cfg).save(tmp_path / "d")
    path = folder / "cfg.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=r"cfg\.json "):
        Crosscoder.load(folder)


def test_nesting_without_end_is_refused(tmp_path):
    cfg = CrosscoderConfig(d_in=2 * D_MODEL, d_sae=8, sites=sites())
    folder = Crosscoder(cfg).save(tmp_path / "d")
    (folder / "cfg.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        Crosscoder.load(folder)


def test_damaged_files_are_refused_and_another_device_is_not_called_damage(crosscoder, tmp_path):
    folder = crosscoder.save(tmp_path / "d")
    weights, path = folder / "sae_weights.safetensors", folder / "cfg.json"
    with pytest.raises(ValueError, match="device 'cuda:99' is not there"):
        Crosscoder.load(folder, device="cuda:99")
    content, tensors, cfg = weights.read_bytes(), load_file(weights), json.loads(path.read_text())
    weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="truncated or does not belong"):
        Crosscoder.load(folder)
    tensors["b_dec"][3] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"NaN or infinity in \['b_dec'\]"):
        Crosscoder.load(folder)
    for kind, name in ((torch.int32, "I32"), (torch.bool, "BOOL")):
        save_file(tensors | {"W_enc": tensors["W_enc"].to(kind)}, weights)
        with pytest.raises(ValueError, match=rf"{{'W_enc': '{name}'}}: weights must be floating"):
            Crosscoder.load(folder)
    weights.write_bytes(content)
    path.write_text(json.dumps(cfg | {"d_sae": 31}))
    with pytest.raises(ValueError, match="truncated or does not belong"):
        Crosscoder.load(folder)
    cfg["sites"][0]["new"] = 1
    path.write_text(json.dumps(cfg))
    with pytest.raises(ValueError, match=r"\['new'\]; .* it is damaged, or of a newer version"):
        Crosscoder.load(folder)
