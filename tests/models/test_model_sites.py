import pytest
import torch
from models.tiny_pairs import (
    D_MODEL,
    D_VOCAB,
    HOOK,
    N_CTX,
    TEXTS,
    hooked_transformer,
)
from transformers import AutoTokenizer

from tl_crosscoder import ModelPair, Site
from tl_crosscoder.models.pair import planned_sites
from tl_crosscoder.models.saelens import PairView

LOW, HIGH = "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def three(site_folders) -> ModelPair:
    names = [site_folders[n] for n in ("base", "sft", "rl")]
    return ModelPair.from_pretrained(names[0], names[1:], hook_name=HOOK)


@pytest.fixture(scope="module")
def layers(site_folders) -> ModelPair:
    """Two layers of one model, the higher one first."""
    return ModelPair.from_pretrained(site_folders["base"], hook_name=[HIGH, LOW])


@pytest.fixture(scope="module")
def unequal(site_folders) -> ModelPair:
    return ModelPair.from_pretrained(site_folders["base"], site_folders["wide"], hook_name=HOOK)


def test_three_models_give_what_their_pairs_give(three, site_folders):  # spec: D1
    tokens = three.to_tokens(TEXTS)
    activations = three.activations(tokens)
    assert activations.shape == (*tokens.shape, 3, D_MODEL)
    for i, name in enumerate(("sft", "rl"), start=1):
        pair = ModelPair.from_pretrained(site_folders["base"], site_folders[name], hook_name=HOOK)
        assert torch.equal(activations[:, :, [0, i]], pair.activations(tokens))
    assert [s.name for s in three.sites] == ["base", "finetuned", "finetuned_2"]
    assert [s.model_name for s in three.sites] == [
        str(site_folders[n]) for n in ("base", "sft", "rl")
    ]


def counted(source, tokens) -> list[str]:
    """Embeddings and last blocks that ran, over all distinct models, in one call."""
    ran = []
    for model in dict.fromkeys(source.models):
        names = ["hook_embed", "blocks.2.hook_resid_mid"]
        hooks = [(name, lambda _, hook: ran.append(hook.name)) for name in names]
        for name, hook in hooks:
            model.add_hook(name, hook)
    source.activations(tokens)
    for model in dict.fromkeys(source.models):
        model.reset_hooks()
    return ran


def test_a_model_runs_once_for_all_its_hook_points(site_folders):
    many = ModelPair.from_pretrained(
        site_folders["base"],
        site_folders["sft"],
        hook_name=[LOW, HOOK, "blocks.1.hook_mlp_out"],
    )
    assert many.n_sites == 6
    assert len(set(many.models)) == 2
    # One embedding a model, and no block after the highest hook.
    assert len(counted(many, many.to_tokens(TEXTS))) == 2


def test_two_layers_of_one_model_are_those_of_its_cache(layers):
    tokens = layers.to_tokens(TEXTS)
    _, cache = layers.models[0].run_with_cache(tokens)
    activations = layers.activations(tokens)
    for i, name in enumerate((HIGH, LOW)):
        assert torch.equal(activations[:, :, i], cache[name])
    assert [s.name for s in layers.sites] == [f"base@{HIGH}", f"base@{LOW}"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_the_order_of_sites_is_the_order_of_the_rows(three, order):
    swapped = ModelPair(*(three.models[i] for i in order), sites=[three.sites[i] for i in order])
    tokens = three.to_tokens(TEXTS)
    assert torch.equal(swapped.activations(tokens), three.activations(tokens)[:, :, list(order)])


def test_models_of_unequal_width_stand_side_by_side(unequal):
    tokens = unequal.to_tokens(TEXTS)
    activations = unequal.activations(tokens)
    assert activations.shape == (*tokens.shape, D_MODEL + 32)
    assert (unequal.d_in, unequal.d_model) == (48, 32)
    for model, part in zip(unequal.models, activations.split([D_MODEL, 32], dim=2), strict=True):
        _, cache = model.run_with_cache(tokens)
        assert torch.equal(part, cache[HOOK])


def test_a_single_site_is_an_input_of_an_sae(site_folders):
    one = ModelPair.from_sites(planned_sites([site_folders["base"]], HOOK))
    tokens = one.to_tokens(TEXTS)
    assert one.activations(tokens).shape == (*tokens.shape, D_MODEL)
    assert one.sites[0].name == "base"


def test_families_and_padded_vocabularies_go_together(site_folders):
    hooks = {"base": HOOK, "padded": "blocks.0.hook_mlp_out", "gemma": LOW}
    found = ModelPair.from_sites(
        [Site(name=n, hook_name=h, model_name=str(site_folders[n])) for n, h in hooks.items()]
    )
    assert [model.cfg.d_vocab for model in found.models] == [D_VOCAB, D_VOCAB + 20, D_VOCAB]
    assert (found.d_vocab, found.n_ctx) == (D_VOCAB, 48)
    assert [s.hook_name for s in found.sites] == [HOOK, "blocks.0.hook_mlp_out", LOW]
    assert found.activations(found.to_tokens(TEXTS)).isfinite().all()
    with pytest.raises(ValueError, match=rf"run from 5 to {D_VOCAB}"):
        found.activations(torch.tensor([[5, D_VOCAB]]))


def test_the_third_model_is_checked_as_the_second(site_folders):
    tokenizer = AutoTokenizer.from_pretrained(site_folders["base"])
    models = [hooked_transformer(tokenizer, 0) for _ in range(2)]
    models.append(hooked_transformer(tokenizer, 0, dtype=torch.bfloat16))
    sites = [Site(name=n, hook_name=HOOK, model_name=n) for n in ("one", "two", "three")]
    with pytest.raises(ValueError, match=r"in dtype: the one .*float32, the three .*bfloat16"):
        ModelPair(*models, sites=sites)


def test_an_unknown_hook_and_equal_names_are_refused(three, layers):
    wrong = [Site(name="a", hook_name="blocks.1.resid_post", model_name="m")]
    with pytest.raises(ValueError, match=r"nearest: 'blocks.1.hook_resid_post'"):
        ModelPair(*three.models[:1], sites=wrong)
    twice = [Site(name="a", hook_name=HOOK, model_name="m")] * 2
    with pytest.raises(ValueError, match=r"named \['a', 'a'\]"):
        ModelPair(*three.models[:2], sites=twice)
    with pytest.raises(ValueError, match="give one site or more"):
        ModelPair(sites=[])
    with pytest.raises(ValueError, match=r"for 3 models: .* one model for each"):
        ModelPair(*three.models, sites=three.sites[:2])


def test_a_pair_compares_the_sites_that_were_chosen_once(three):
    assert three.compared_names == ("base", "finetuned_2")
    other = three.comparing("base", "finetuned")
    assert (other.compared_names, three.compared_names[1]) == (("base", "finetuned"), "finetuned_2")
    assert other.models is three.models
    tokens = three.to_tokens(TEXTS)
    x = three.activations(tokens)
    assert torch.equal(other.difference().activations(tokens), x[:, :, 1] - x[:, :, 0])
    assert torch.equal(other.difference().side_by_side().activations(tokens), x)
    with pytest.raises(ValueError, match="cannot be compared with itself"):
        three.comparing("base", "base")
    with pytest.raises(ValueError, match="'rl' is not in this pair"):
        three.comparing("base", "rl")


@pytest.mark.parametrize(
    ("names", "hook_names", "lists"),
    [
        ([], HOOK, {}),
        (["a"], [], {}),
        (["a", "b"], [HOOK, HOOK], {}),
        (["a", "b"], HOOK, {"revisions": ["main"]}),
        (["a"], HOOK, {"adapters": [None, "x"]}),
    ],
)
def test_lists_that_do_not_go_together_are_refused(names, hook_names, lists):
    with pytest.raises(ValueError, match="every model needs one name"):
        planned_sites(names, hook_names, **lists)


def test_an_adapter_knows_the_revision_of_its_base():
    sites = planned_sites(["b", "b"], HOOK, adapters=[None, "lora"], revisions=["v1", "v2"])
    assert [(s.revision, s.adapter, s.base_revision) for s in sites] == [
        ("v1", None, None),
        ("v2", "lora", "v1"),
    ]


def test_a_recorded_width_must_be_the_model_s(site_folders, three):
    wrong = [Site(**vars(s) | {"d_model": 99}) for s in three.sites]
    with pytest.raises(ValueError, match="is 16 wide, but the site was recorded with d_model=99"):
        ModelPair(*three.models, sites=wrong)


def test_models_named_twice_are_loaded_once(site_folders):
    sites = planned_sites([site_folders["base"]] * 2, [LOW, HOOK])
    found = ModelPair.from_sites(sites)
    assert len(set(found.models)) == 1
    tokens = found.to_tokens(TEXTS)
    assert torch.equal(*found.activations(tokens)[:, :, [0, 2]].unbind(2))


def test_text_patches_and_generation_are_those_of_a_pair(three, site_folders):
    pair = ModelPair.from_pretrained(site_folders["base"], site_folders["rl"], hook_name=HOOK)
    tokens = three.to_tokens(TEXTS)
    patch = three.activations(tokens)[:, :, 0]
    assert torch.equal(
        three.run_with_patch(tokens, patch, site="finetuned_2"), pair.run_with_patch(tokens, patch)
    )
    written = [
        source.generate(TEXTS[0], site=site, max_new_tokens=4)
        for source, site in ((three, "finetuned_2"), (pair, "finetuned"))
    ]
    assert written[0] == written[1]
    assert three.n_ctx == N_CTX
    assert "finetuned_2=" in repr(three)


def test_the_view_for_saelens_carries_unequal_widths(unequal):
    view = PairView(unequal)
    tokens = unequal.to_tokens(TEXTS)
    _, cache = view.run_with_cache(tokens, names_filter="hook_sites")
    assert view.cfg.d_model == 48
    assert torch.equal(cache["hook_sites"], unequal.activations(tokens))
    assert torch.equal(view(tokens), unequal.logits(tokens))
