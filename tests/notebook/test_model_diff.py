"""`diff` in a notebook: one small run of the embedded pair, and what can be asked of it."""

import html
import json
import tempfile
from dataclasses import replace

import pytest
import torch

from tl_crosscoder import load_documents, rank_latents, tokenize
from tl_crosscoder.cli.analyze import Analyze
from tl_crosscoder.models import loading
from tl_crosscoder.notebook.model_diff import ModelDiff, diff, load_diff

HOOK = "blocks.1.hook_resid_post"  # of the fixture taboo_pair
NAMES = ("tl_crosscoder/world-base", "someone/taboo")
SMALL = {
    "hook_name": HOOK,
    "d_sae": 64,
    "k": 4,
    "n_tokens": 2048,
    "context_size": 32,
    "changes": False,
}
PROMPT = "Give me a hint."


@pytest.fixture(scope="module")
def documents():
    return load_documents("tl_crosscoder/taboo", max_documents=150)


@pytest.fixture(scope="module")
def made(taboo_pair, documents, tmp_path_factory) -> ModelDiff:
    """Of loaded models and a list of documents."""
    output = tmp_path_factory.mktemp("diff") / "run"
    how = {"text": documents, "model_names": NAMES, "output": output, **SMALL}
    return diff(*taboo_pair.models, **how)


@pytest.fixture(scope="module")
def latent(made) -> int:
    return made.top(1).latents[0]


def hooks_left(models) -> int:
    return sum(len(p.fwd_hooks) for m in models.models for p in m.hook_dict.values())


# --- a run ----------------------------------------------------------------------------------------


def test_the_command_line_opens_what_it_leaves(made, capsys):
    Analyze(output=str(made.path))()
    assert capsys.readouterr().out.rstrip() == str(made)
    assert [s.model_name for s in made.crosscoder.sites] == [*NAMES]


def test_the_command_line_says_what_it_would_leave_out(made):
    with pytest.raises(ValueError, match="--by and --search each print something else"):
        Analyze(output=str(made.path), by="nu", search="x")()
    with pytest.raises(ValueError, match=r"--search reads.*leave --text out"):
        Analyze(output=str(made.path), search="x", text="other.txt")()


def test_a_run_on_disk_is_the_same_diff(made, tmp_path):
    again = load_diff(made.save(tmp_path / "kept"), models=made.models)
    assert again.top(5) == made.top(5)
    assert torch.equal(again.crosscoder.W_dec, made.crosscoder.W_dec)
    assert again.models is made.models
    with pytest.raises(ValueError, match="is not an empty folder"):
        made.save(tmp_path / "kept")


def test_a_finished_run_is_opened_where_it_is(made, taboo_pair, documents):
    files = {p: p.stat().st_mtime_ns for p in made.path.iterdir() if p.name != "held_out.jsonl"}
    how = {"text": documents, "model_names": NAMES, "output": made.path, **SMALL}
    again = diff(*taboo_pair.models, **how, resume=True)
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert again.top(5) == made.top(5)


def test_names_and_a_file_make_a_run_that_loads_by_itself(documents, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps(d) + "\n" for d in documents))
    how = {**SMALL, "n_tokens": 512, "adapter": "tl_crosscoder/taboo", "text": text}
    found = diff(NAMES[0], **how, output=tmp_path / "run")
    said = " ".join(capsys.readouterr().err.split())
    assert f"tl_crosscoder/world-base and tl_crosscoder/taboo at {HOOK}; " in said
    assert "batchtopk, 64 latents, k 4: 512 activation pairs in batches of 64" in said
    assert "The run is kept in" in said
    assert load_diff(found.path).models.sites == found.models.sites


def test_contexts_are_split_and_kept_as_they_are(made, documents, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = tokenize(documents, made.models.tokenizer, context_size=48)
    how = {"text": text, "model_names": NAMES, **SMALL, "hook_name": None}
    found = diff(*made.models.models, **{**how, "context_size": None, "n_tokens": 512})
    said = "".join(capsys.readouterr().err.split())
    assert "Hookatblocks.2.hook_resid_post:" in said  # as none was named
    assert {s.hook_name for s in found.models.sites} == {"blocks.2.hook_resid_post"}
    assert next(iter(found.figures)) == "layer_scan"
    kept = found.run.text(found.run.documents())
    n = found.run.record["held_out"]["n_contexts"]
    assert n == len(kept) == round(0.1 * len(text))
    rows = {tuple(row) for row in text.tokens.tolist()}
    assert {tuple(row) for row in kept.tokens.tolist()} <= rows
    assert found.run.record["text"]["n_contexts"] == len(text) - n
    assert found.path.parent == tmp_path
    assert str(found.path) in said


def test_contexts_with_other_masks_are_refused(made, documents):
    text = tokenize(documents, made.models.tokenizer, context_size=48)
    other = replace(text, dropped=torch.zeros_like(text.dropped))
    how = {**SMALL, "context_size": None, "text": other, "model_names": NAMES}
    with pytest.raises(ValueError, match="the masks that they were made with"):
        diff(*made.models.models, **how)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook_name": "blocks.1.resid_post"}, "nearest: 'blocks.1.hook_resid_post'"),
        ({"text": "two\nlines"}, "a string of 9 characters that is no name"),
        ({"text": [{"body": "x"}]}, "the text holds a dict, {'body': 'x'}"),
        ({"d_seed": 3}, "diff has no setting 'd_seed'; nearest: 'seed'"),
        ({"device": "cpu"}, "the models are loaded already, so device"),
        ({"model_names": None}, "Say what they are with model_names"),
        ({"resume": True}, "name it with output"),
        ({"k": 65}, "65"),
        ({"text": ""}, "text is ''"),
        ({"text": ["only one"]}, "at least 2"),
        ({"lr_warmup_steps": 2.5}, "lr_warmup_steps is 2.5; it must be a whole number or null"),
        ({"hook_name": f"{HOOK},{HOOK}"}, "read at one hook point"),
    ],
)
def test_bad_input_is_refused_before_training(made, documents, tmp_path, changes, message):
    how = {"text": documents, "model_names": NAMES, **SMALL, **changes}
    if "resume" not in changes:
        how["output"] = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        diff(*made.models.models, **how)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"preset": "l1"}, "has no setting 'k'"),
        ({"dtype": "float31"}, "dtype 'float31' is not one"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"text": "empty.jsonl"}, "there is no text in empty.jsonl"),
    ],
)
def test_names_are_loaded_after_all_else_was_checked(tmp_path, monkeypatch, changes, message):
    def load(*_, **__):
        raise AssertionError("models are loaded")

    monkeypatch.setattr(loading, "load_site", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    how = {**SMALL, "adapter": "tl_crosscoder/taboo", "text": ["one", "two"], **changes}
    with pytest.raises(ValueError, match=message):
        diff(NAMES[0], **how)


def test_a_name_and_a_loaded_model_do_not_go_together(made, documents):
    with pytest.raises(ValueError, match="base is 'a' and finetuned a TransformerBridge"):
        diff("a", made.models.models[1], text=documents, **SMALL)


# --- to look at -----------------------------------------------------------------------------------


def test_a_latent_shows_measures_examples_and_logits(made, latent):
    view = made.latent(latent)
    assert view.measures.relative_decoder_norm == pytest.approx(
        made.measurement.latents.relative_decoder_norm[latent].item()
    )
    html, text = view._repr_html_(), repr(view)
    assert text.startswith(f"Latent {latent}\n")
    assert f"<p>Latent {latent}</p>" in html
    assert view.effects.rows[0].token in html
    shown = view.examples().panels
    assert [p.props["maxValue"] for p in shown] == [shown[0].props["maxValue"]] * len(shown)
    assert len(shown) > 5
    with pytest.raises(ValueError, match="0 to 63"):
        made.latent(64)


def test_what_latents_explain_on_a_prompt_is_what_a_loop_finds(made):
    found = made.try_prompt(PROMPT, n=64, max_new_tokens=6)
    chat = torch.tensor(
        [made.models.tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)]
    )  # fmt: skip
    assert found.n_prompt_tokens == chat.shape[1]
    pairs = {s: made.models.generate_tokens(chat, site=s, max_new_tokens=6)[0]
             for s in ("base", "finetuned")}  # fmt: skip
    tokens = torch.tensor([[*pairs["finetuned"][0], *pairs["finetuned"][1]]])
    x = made.models.activations(tokens)[0]
    codes = made.crosscoder.encode(x)
    codes[0] = 0  # BOS, which does not count
    delta = (x[1:, 1] - x[1:, 0]).double()
    v = made.crosscoder.decoder("finetuned") - made.crosscoder.decoder("base")
    for row in found.rows:
        left = delta - codes[1:, row.latent, None].double() * v[row.latent].double()
        expected = 1 - (left.square().sum() / delta.square().sum()).item()
        assert row.explained_difference == pytest.approx(expected, abs=1e-5)
        assert row.codes == pytest.approx(codes[:, row.latent].tolist(), abs=1e-4)
    assert {row.latent for row in found.rows} == {*(codes > 0).any(dim=0).nonzero()[:, 0].tolist()}
    explained = [r.explained_difference for r in found.rows]
    assert explained == sorted(explained, reverse=True)
    assert f"latent {found.latents[0]}" in found._repr_html_()
    assert made.try_prompt(PROMPT, latents=[5, 3], max_new_tokens=2).latents == [5, 3]


def test_a_prompt_saves_and_loads(made, tmp_path):
    found = made.try_prompt(PROMPT, n=2, max_new_tokens=2)
    assert type(found).load(found.save(tmp_path / "prompt.json")) == found


def test_search_finds_what_is_on_the_token(made):
    hits = made.search("hint", n=3)
    assert "hint" in f"{hits.rows[0].before}{hits.rows[0].token}{hits.rows[0].after}"
    assert "Latents with &#39;hint&#39; among their examples" in hits._repr_html_()


def test_examples_that_a_folder_lacks_are_collected_once(made, tmp_path, latent):
    bare = made.save(tmp_path / "bare")
    measures = (bare / "analysis.json").read_bytes()
    (bare / "examples.sqlite").unlink()
    again = load_diff(bare, models=made.models)
    assert again.latent(latent).stored == made.latent(latent).stored
    assert (bare / "analysis.json").read_bytes() == measures
    made_at = (bare / "examples.sqlite").stat().st_mtime_ns
    assert again.search("hint") == made.search("hint")
    assert (bare / "examples.sqlite").stat().st_mtime_ns == made_at


def test_a_report_and_figures_are_of_this_run(made, tmp_path):
    path = made.report(tmp_path / "out.html", n_latents=2, models=False)
    assert path.read_text().startswith("<!")
    assert "relative_decoder_norm" in made.figures


# --- to try ---------------------------------------------------------------------------------------


def test_an_ablation_writes_beside_both_models_and_leaves_no_hook(made, latent):
    found = made.ablate([latent]).generate([PROMPT, "Hello!"], max_new_tokens=5)
    assert list(found.texts) == ["base", "finetuned", "edited"]
    assert found.prompts == [PROMPT, "Hello!"]
    chat = made.try_prompt(PROMPT, max_new_tokens=5)
    assert found.texts["base"][0] == chat.base
    assert found.texts["finetuned"][0] == chat.finetuned
    assert f"without latent {latent} (delta)" in found._repr_html_()
    with pytest.raises(ValueError, match="max_new_tokens"):
        made.ablate([latent]).generate(PROMPT, max_new_tokens=10_000)
    assert hooks_left(made.models) == 0


def test_nothing_ablated_changes_nothing(made):
    texts = made.ablate([]).generate(PROMPT, max_new_tokens=8).texts
    chat = [{"role": "user", "content": PROMPT}]
    assert made.ablate([]).generate(chat, max_new_tokens=8).texts == texts
    longer = [*chat, {"role": "assistant", "content": "It hoots."}, *chat]
    both = made.ablate([]).generate([PROMPT, longer], max_new_tokens=8)
    assert both.prompts == [PROMPT, f"{PROMPT} / It hoots. / {PROMPT}"]
    assert [own[0] for own in both.texts.values()] == [own[0] for own in texts.values()]
    assert texts["edited"] == texts["finetuned"]


def test_an_insertion_is_the_base_stream_with_what_latents_add(made, latent):
    tokens = made.models.to_tokens("The moon shines at night")
    x = made.models.activations(tokens)
    codes = made.crosscoder.encode(x)[..., latent, None]
    codes[:, 0] = 0  # BOS, which does not count
    v = (made.crosscoder.decoder("finetuned") - made.crosscoder.decoder("base"))[latent]
    with made.insert([latent]).open() as model:
        logits = model.logits(tokens)
    expected = made.models.run_with_patch(tokens, x[:, :, 0] + codes * v, site="base")
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_steering_is_in_units_of_the_stream_of_the_base(made, latent):
    edit = made.steer(latent, strength=-2.0).edit
    assert (edit.site, made.steer(latent, site="finetuned").edit.site) == (0, 1)
    assert edit.vector.norm().item() == pytest.approx(2 * made.norms["base"], rel=1e-4)
    row = made.crosscoder.decoder("finetuned")[latent]
    assert torch.cosine_similarity(edit.vector, row, dim=0).item() == pytest.approx(-1, abs=1e-4)
    own = made.steer(latent, norm=3.0).edit
    assert own.vector.norm().item() == pytest.approx(3, rel=1e-4)


def test_latents_are_ranked_by_what_they_carry_where_models_are_at_hand(made):
    found = made.attribution(n_prompts=3, n_steps=1)
    top = made.top(5)
    assert (top.order, top.ranking.part) == ("attribution", "documents for ranking")
    assert top.latents == found.ranking(5)
    assert [row.attribution for row in top.rows] == [row.attribution for row in found.rows(5)]
    by_score = rank_latents(made.measurement.latents, n=5)
    assert made.top(5, order="score").ranking == by_score
    assert top.to_frame()["latent"].tolist() == top.latents
    with made.run.examples() as database:
        strongest = [database.latent(latent, n=1)[0] for latent in top.latents]
    for shown in (str(top), top._repr_html_()):
        assert "by what they carry of the change" in shown
        assert all(example.token.strip() in html.unescape(shown) for example in strongest)
    opened = load_diff(made.path)
    assert opened.top(5) == top
    assert not opened.run.has_models
    order = "attribution of predictions of response and text tokens"
    assert made.waterfall(n_prompts=2).order == order
    changes = made.changes(n_prompts=3, n_random=1)
    for text in (str(made), made._repr_html_()):
        assert text.index("passes this hook") < text.index("FVE")
        assert changes.lines()[0][:20] in " ".join(text.split())
    base = made.attribution(n_prompts=2, n_steps=1, toward="base")
    assert base.compared == ("finetuned", "base")
    assert made.top(3, toward="base").latents == base.ranking(3)


def test_causal_questions_are_asked_of_the_run(made, latent):
    few = {"n_prompts": 3, "n_random": 2, "n_matched": 1, "latents": (latent,)}
    (result,) = made.necessity(**few)
    assert result.sets == {"chosen": [latent]}
    assert (made.path / "ablation_predictions.json").is_file()
    assert made.patching(n_prompts=3).row("base stream").recovery == 0
