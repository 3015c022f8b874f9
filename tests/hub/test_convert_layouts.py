"""Variants of the layouts: what can be represented is exact, what cannot is refused by name."""

import hashlib
import json
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tl_crosscoder import Crosscoder
from tl_crosscoder.cli.hub import Import
from tl_crosscoder.hub.convert import convert
from tl_crosscoder.models.site import Site

D, F = 3, 10
NAMES = {"base": "org/base", "finetuned": "org/sft", "hook_name": "blocks.1.hook_resid_post"}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = randn(200, 2, D, seed=9)


def weights(n_encoded: int = 2) -> dict[str, Tensor]:
    return {
        "encoder.weight": randn(n_encoded, D, F, seed=1),
        "encoder.bias": randn(F, seed=2),
        "decoder.weight": randn(2, F, D, seed=3),
        "decoder.bias": randn(2, D, seed=4),
    }


def write(folder: Path, tensors: dict[str, Tensor], config: dict | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def codes_of(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """relu(sum_m <x^m, W^m> + b), as their encoder has it."""
    return torch.relu(
        torch.einsum("bmd,mdf->bf", x, tensors["encoder.weight"]) + tensors["encoder.bias"]
    )


@pytest.mark.parametrize(
    "kind", ["CROSSCODER", "SAE", "MIXED", "NONE", "stored", "no config", "older"]
)
def test_the_threshold_is_of_the_scaled_code(kind, tmp_path):
    """f n > 2 with n the summed norms, the joint norm, 0.5 joint + 0.25 summed, or 1."""
    tensors = weights() | {"threshold": torch.tensor(2.0), "k": torch.tensor(3)}
    summed = tensors["decoder.weight"].norm(dim=2).sum(dim=0)
    joint = tensors["decoder.weight"].norm(dim=(0, 2))
    config = {"dict_class": "BatchTopKCrossCoder", "code_normalization": kind}
    n = {"SAE": joint, "MIXED": 0.5 * joint + 0.25 * summed, "NONE": 1.0}.get(kind, summed)
    if kind == "MIXED":
        config |= {"code_normalization_alpha_sae": 0.5, "code_normalization_alpha_cc": 0.25}
    elif kind in ("stored", "no config", "older"):
        config = None if kind == "no config" else {"activation_dim": D}
        if kind == "stored":  # the number in the tensors says SAE
            tensors["code_normalization_id"], n = torch.tensor(2), joint
    f = codes_of(tensors, X)
    expected = f * (f * n > 2)
    found = convert(write(tmp_path / "d", tensors, config), **NAMES)
    assert torch.equal(found.encode(X) > 0, expected > 0)
    torch.testing.assert_close(found.encode(X), expected, atol=1e-6, rtol=1e-5)
    assert 0 < (expected > 0).sum() < (f > 0).sum()


def test_normalisation_is_folded_by_hand(tmp_path):
    """d = 1, one latent, x = (5, 7), means (1, 3), scales (0.5, 2).

    Their input is ((5 - 1) 0.5, (7 - 3) 2) = (2, 8); f = 3 * 2 + 1 * 8 - 4 = 10. Their output
    (10 * 0.2 + 1, 10 * 0.1 - 0.5) = (3, 0.5), which is (3 / 0.5 + 1, 0.5 / 2 + 3) = (7, 3.25).
    """
    tensors = {
        "encoder.weight": torch.tensor([[[3.0]], [[1.0]]]),
        "encoder.bias": torch.tensor([-4.0]),
        "decoder.weight": torch.tensor([[[0.2]], [[0.1]]]),
        "decoder.bias": torch.tensor([[1.0], [-0.5]]),
        "activation_mean": torch.tensor([[1.0], [3.0]]),
        "activation_std": torch.tensor([[2.0], [0.5]]),
        "activation_global_scale": torch.tensor([0.5, 2.0]),
        "target_rms": torch.tensor(1.0),
    }
    found = convert(write(tmp_path / "d", tensors), **NAMES)
    x = torch.tensor([[[5.0], [7.0]]])
    torch.testing.assert_close(found.encode(x), torch.tensor([[10.0]]))
    torch.testing.assert_close(found(x), torch.tensor([[[7.0], [3.25]]]))
    torch.testing.assert_close(found.decoder_norms(), torch.tensor([[0.2, 0.1]]))
    del tensors["activation_global_scale"]
    with pytest.raises(ValueError, match="without all three the scale of the input is unknown"):
        convert(write(tmp_path / "d", tensors), **NAMES)


def test_an_encoder_of_one_layer_reads_that_site_alone(tmp_path):
    tensors = weights(n_encoded=1)
    found = convert(write(tmp_path / "d", tensors, {"encoder_layers": [1]}), **NAMES)
    torch.testing.assert_close(found.encode(X), codes_of(tensors, X[:, 1:]), atol=1e-6, rtol=1e-5)
    assert found.encoder("base").count_nonzero() == 0
    for layers in ([0, 1], [2]):
        folder = write(tmp_path / "d", tensors, {"encoder_layers": layers})
        with pytest.raises(ValueError, match="a crosscoder decodes the sites that it may encode"):
            convert(folder, **NAMES)


def test_a_latent_without_decoder_is_never_active(tmp_path):
    tensors = weights() | {"threshold": torch.tensor(0.0)}
    tensors["decoder.weight"][:, 4] = 0
    codes = convert(write(tmp_path / "d", tensors), **NAMES).encode(X)
    assert codes[:, 4].count_nonzero() == 0
    assert (codes[:, :4] > 0).any(dim=0).all()


def test_a_trainers_folder_of_pickled_tensors(tmp_path):
    """torch.compile's prefix, and a record that holds much besides."""
    tensors = weights() | {"threshold": torch.tensor(0.5)}
    config = {"trainer": {"dict_class": "BatchTopKCrossCoder", "lm_name": "a-b", "steps": 3}}
    torch.save({f"_orig_mod.{n}": t for n, t in tensors.items()}, tmp_path / "model_final.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = convert(tmp_path, **NAMES)
    assert found.cfg.metadata.imported_from["class"] == "BatchTopKCrossCoder"
    f = codes_of(tensors, X)
    n = tensors["decoder.weight"].norm(dim=2).sum(dim=0)
    assert torch.equal(found.encode(X) > 0, f * n > 0.5)


@pytest.mark.parametrize(
    ("more", "config", "message"),
    [
        (
            {},
            {"dict_class": "BatchTopKCrossCoder"},
            "without one threshold.*is none in the file",
        ),
        ({"threshold": torch.tensor(-1.0)}, {}, r"without one threshold.*stored one is -1\.0"),
        ({}, {"code_normalization": "DECOUPLED"}, "gives each layer codes of its own"),
        ({"code_normalization_id": torch.tensor(5)}, {}, "gives each layer codes of its own"),
        ({"code_normalization_id": torch.tensor(2)}, {"code_normalization": "NONE"}, "correct the"),
        ({}, {"dict_class": "DedicatedFeatureCrossCoder"}, "dict_class 'DedicatedFeatureCross"),
        ({}, {"latent_processor": "softmax"}, "latent_processor 'softmax'"),
        ({}, {"decoder_type": "mlp"}, r"the fields \['decoder_type'\]"),
        ({"pre_bias": torch.zeros(2, D)}, {}, r"the tensors \['pre_bias'\]"),
        ({"encoder.weight": randn(F, D), "decoder.weight": randn(D, F)}, {}, "is not a crosscoder"),
    ],
)
def test_what_dictionary_learning_has_and_we_have_not(more, config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(write(tmp_path / "d", weights() | more, config), **NAMES)


def kissane() -> dict[str, Tensor]:
    made = weights()
    return {
        "W_enc": made["encoder.weight"],
        "W_dec": made["decoder.weight"].transpose(0, 1),
        "b_enc": made["encoder.bias"],
        "b_dec": made["decoder.bias"],
    }


@pytest.mark.parametrize(
    ("more", "config", "message"),
    [
        ({}, {"k": 32}, r"{'k': 32} in its config"),
        ({}, {"pre_bias": True}, r"{'pre_bias': True} in its config"),
        ({"W_dec": randn(F, D)}, {}, r"with W_dec of \[10, 3\], which"),
        ({"b_pre": randn(2, D)}, {}, r"the tensors \['b_pre'\]"),
        ({"b_enc": None}, {}, r"lacks the tensors \['b_enc'\]"),
    ],
)
def test_forks_of_the_ckkissane_layout(more, config, message, tmp_path):
    tensors = {n: t for n, t in (kissane() | more).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        convert(write(tmp_path / "d", tensors, config), **NAMES)


RELU = "activation_fn: {classname: ReLUActivation, cfg: {}}\n"


def crosscode(folder: Path, yaml: str = RELU, **more: Tensor | None) -> Path:
    """Two models at two hook points: [n_models, n_hookpoints, d, F]."""
    tensors = {
        "_W_enc_XiDiL": randn(2, 2, D, F, seed=1),
        "_W_dec_LXoDo": randn(F, 2, 2, D, seed=2),
        "b_enc_L": randn(F, seed=3),
        "_b_dec_XoDo": randn(2, 2, D, seed=4),
    } | more
    torch.save({n: t for n, t in tensors.items() if t is not None}, folder / "model.pt")
    (folder / "model_cfg.yaml").write_text(yaml)
    return folder


TWO_HOOKS = NAMES | {"hook_name": "blocks.1.hook_resid_post,blocks.2.hook_resid_post"}


def test_hook_points_of_two_models_are_sites_model_by_model(tmp_path):
    """And dimensions written as Python tuples are read without making Python objects."""
    yaml = RELU + "crosscoding_dims: !!python/tuple\n- 2\n- 2\n"
    found = convert(crosscode(tmp_path, yaml, b_enc_L=None, _b_dec_XoDo=None), **TWO_HOOKS)
    assert [(s.model_name, s.hook_name) for s in found.sites] == [
        (model, hook)
        for model in ("org/base", "org/sft")
        for hook in TWO_HOOKS["hook_name"].split(",")
    ]
    x = randn(50, 2, 2, D, seed=5)
    f = torch.relu(torch.einsum("bmpd,mpdf->bf", x, randn(2, 2, D, F, seed=1)))
    x_hat = torch.einsum("bf,fmpd->bmpd", f, randn(F, 2, 2, D, seed=2))
    torch.testing.assert_close(found.encode(x.flatten(1, 2)), f)
    torch.testing.assert_close(found(x.flatten(1, 2)), x_hat.flatten(1, 2), atol=1e-5, rtol=1e-5)


def test_scales_that_were_folded_in_are_those_of_the_sites(tmp_path):
    factors = torch.tensor([[0.5, 1.0], [2.0, 4.0]])
    folded = {f"folded_scaling_factors_{n}": factors for n in ("in_Xi", "out_Xo")}
    plain = convert(crosscode(tmp_path), **TWO_HOOKS)
    found = convert(crosscode(tmp_path, is_folded=torch.tensor(True), **folded), **TWO_HOOKS)
    assert [s.scale for s in found.sites] == [0.5, 1.0, 2.0, 4.0]
    assert torch.equal(found.W_enc, plain.W_enc)
    torch.testing.assert_close(
        found.decoder_norms(), plain.decoder_norms() * torch.tensor([0.5, 1.0, 2.0, 4.0])
    )
    folded["folded_scaling_factors_out_Xo"] = 2 * factors
    with pytest.raises(ValueError, match="differ between input and output"):
        convert(crosscode(tmp_path, is_folded=torch.tensor(True), **folded), **TWO_HOOKS)


@pytest.mark.parametrize(
    ("more", "yaml", "message"),
    [
        ({}, "activation_fn: {classname: BatchTopkActivation, cfg: {k_per_example: 3}}\n",
         r"'BatchTopkActivation' \(one that selects over a token or a batch"),
        ({}, "{}", "activation_fn None"),
        ({}, RELU + "dtype: !!python/name:torch.float32 ''\n", "write what they stand for"),
        ({"_W_dec_LXoDo": randn(F, 5, D)}, RELU, r"decoder of \[5, 3\] \(a transcoder\)"),
        ({"_W_skip_XiDiXoDo": randn(2)}, RELU, r"the tensors \['_W_skip_XiDiXoDo'\]"),
    ],
)  # fmt: skip
def test_what_crosscode_has_and_we_have_not(more, yaml, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        convert(crosscode(tmp_path, yaml, **more), **TWO_HOOKS)


class Payload:
    """What a pickle would run when it is opened without care."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_of_more_than_tensors_is_not_opened(tmp_path, capsys):
    torch.save({"W_enc": Payload()}, tmp_path / "cc_weights.pt")
    with pytest.raises(ValueError, match="cannot be read safely"):
        convert(tmp_path, **NAMES)
    torch.save([1, 2], tmp_path / "cc_weights.pt")
    with pytest.raises(ValueError, match="holds list and not tensors by name"):
        convert(tmp_path, **NAMES)
    (tmp_path / "cc_weights.pt").write_bytes(b"PK cut off")
    with pytest.raises(ValueError, match="cannot be read safely"):
        convert(tmp_path, **NAMES)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({7: torch.ones(2)}, "holds Tensor under 7 and not tensors by name"),
        ({"b_enc": torch.ones(1).expand(10**9)}, r"'b_enc' of shape .1000000000., which is more"),
        (
            {"b_enc": torch.empty(10**6, device="meta")},
            r"'b_enc' of shape .1000000., which is more",
        ),
        ({"b_enc": torch.empty(2, device="meta")}, "holds Tensor under 'b_enc' and not tensors"),
        ({"b_enc": torch.ones(F).to_sparse()}, "not tensors by name|cannot be read safely"),
        (
            {"W_enc": torch.ones(2, D, F, dtype=torch.int64)},
            "{'W_enc': 'torch.int64'}: weights must",
        ),
        ({"b_enc": torch.ones(F, dtype=torch.bool)}, "{'b_enc': 'torch.bool'}: weights must be fl"),
        ({"b_enc": torch.ones(F + 1)}, "are not of one dictionary|has another shape than"),
        ({"W_enc": torch.ones(F)}, r"has W_enc of shape \[10\]"),
    ],
)
def test_a_pickle_of_odd_tensors_is_refused_before_it_takes_memory(change, message, tmp_path):
    tensors = {"W_enc": randn(2, D, F), "W_dec": randn(F, 2, D), "b_enc": randn(F)}
    torch.save(tensors | {"b_dec": randn(2, D)} | change, tmp_path / "cc_weights.pt")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path, **NAMES)


def test_a_config_that_grows_without_end_is_refused(tmp_path):
    write(tmp_path, {"_W_enc_XiDiL": randn(2, D, F), "_W_dec_LXoDo": randn(F, 2, D)})
    (tmp_path / "model_cfg.yaml").write_text("a: &a [*a, *a]")
    with pytest.raises(ValueError, match="values, aliases"):
        convert(tmp_path, **NAMES)


def test_what_is_not_there_or_no_dictionary_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        convert(tmp_path / "nothing", **NAMES)
    with pytest.raises(FileNotFoundError, match="on the hub a dictionary is owner/name"):
        convert("nothing", **NAMES)
    with pytest.raises(FileNotFoundError, match="has no weights: none of"):
        convert(tmp_path, **NAMES)
    with pytest.raises(ValueError, match="the tensors of no known layout"):
        convert(write(tmp_path / "d", {"weight": torch.zeros(2)}), **NAMES)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="nothing is to be converted"):
        convert(tmp_path, **NAMES)


def cached(root: Path, name: str, revision: str, inner: str, folder: Path) -> None:
    """A folder as the hub's cache holds it, in a folder `inner` of a repository."""
    repo = root / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name}{revision}".encode()).hexdigest()
    target = repo / "snapshots" / commit / inner
    target.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / revision).write_text(commit)


def test_the_hub_by_name_folder_file_and_revision(tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision, inner in (("main", "."), ("main", "layer_1"), ("v2", ".")):
        tensors = weights() | {"encoder.bias": torch.full((F,), float(len(revision + inner)))}
        folder = write(tmp_path / f"{revision}-{inner}", tensors)
        cached(hub, "somebody/coders", revision, inner, folder)

    def bias(name: str, revision: str | None = None) -> float:
        found = convert(name, **NAMES, revision=revision)
        assert found.cfg.metadata.imported_from["name"] == name
        return found.b_enc[0].item()

    assert bias("somebody/coders") == 5
    assert bias("somebody/coders", "v2") == 3
    assert bias("somebody/coders/layer_1") == 11
    assert bias("somebody/coders/layer_1/model.safetensors") == 11
    with pytest.raises(FileNotFoundError, match=r"has no file other\.pt"):
        convert("somebody/coders/other.pt", **NAMES)
    with pytest.raises(FileNotFoundError, match="has no weights"):
        convert("somebody/coders/layer_2", **NAMES)
    with pytest.raises(ValueError, match="is not in the hub's cache, and HF_HUB_OFFLINE forbids"):
        convert("somebody/else", **NAMES)


def test_sites_may_be_given_whole(tmp_path):
    sites = [
        Site(name=n, hook_name="blocks.0.hook_out", model_name=f"org/{n}", revision="v1")
        for n in ("before", "after")
    ]
    found = convert(write(tmp_path / "d", weights()), sites=sites)
    assert [(s.name, s.revision, s.d_model) for s in found.sites] == [
        ("before", "v1", D),
        ("after", "v1", D),
    ]


def test_the_verb_writes_a_dictionary(tmp_path, capsys):
    folder = write(
        tmp_path / "d", kissane(), {"model_name": "org/base", "hook_point": "blocks.1.x"}
    )
    output = tmp_path / "out"
    Import(source=str(folder), output=str(output), finetuned="org/sft", scales=(0.5, 2.0))()
    said = capsys.readouterr().out
    assert f"{output} holds a crosscoder of ckkissane: d_sae={F}, sites=(base: org/base" in said
    found = Crosscoder.load(output)
    assert torch.equal(
        found.encode(X), convert(folder, finetuned="org/sft", scales=(0.5, 2.0)).encode(X)
    )
    with pytest.raises(ValueError, match="not an empty folder"):
        Import(source=str(folder), output=str(output), finetuned="org/sft")()
