# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3. Find what fine-tuning changed
#
# What did it change, and which of a thousand latents belong to the change? Attribution, norms,
# Latent Scaling and the difference itself give answers, which do not agree. The embedded fine-tune
# *false-fact* believes one wrong thing about an invented country; pretend not to know which.
#
# For your own run, such as one of Gemma, put its folder in place of the name in the next cell:
# `tlc.load_diff("runs/gemma", device="cuda")`.

# %%
# On Colab this installs the package; elsewhere it does nothing. A repository's address
# ("git+https://...") or an uploaded wheel does in place of the name.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tl-crosscoder"], check=True)

# %%
import tl_crosscoder as tlc
from tl_crosscoder.analysis.lens import logit_effect
from tl_crosscoder.baselines.difference import activation_difference
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.waterfall import Waterfall

diff = tlc.load_diff("tl_crosscoder/false-fact-batchtopk")
figures = diff.figures

# %% [markdown]
# ## The short answer
#
# How much of the change passes this hook and the latents, and then the few things that changed:
# what both models write where it happens, latents, what removing them undoes (with controls), and
# what that costs elsewhere. Groups of latents were found on half of the documents, and tested on
# the other half. It came with the dictionary; `diff.changes()` asks again, `diff.curves()` how
# many latents it takes.

# %%
changes = Changes.load(diff.run.path / "changes.json")
print(Waterfall.load(diff.run.path / "waterfall.json").line(), *changes.lines(), sep="\n")

# %% [markdown]
# Look for what returns in the texts: names, a kind of answer, a tone. The latents of a change are
# those that *cause* it. What do measures that run no model say of them?
#
# ## By decoder norm
#
# R is 1 where only the fine-tuned model is written to. Kassem et al. 2026 take the largest. With
# BatchTopK nearly all latents write to both models, and R is about a half.

# %%
figures["relative_decoder_norm"]

# %%
diff.top(5, order="relative_decoder_norm")

# %% [markdown]
# Look at *explained difference*: a latent can write to one model alone, and explain next to
# nothing of what changed, or make the error larger (a negative share). `docs/measures.md` measures
# what taking out the first of each ranking does.
#
# ## By Latent Scaling
#
# Minder et al. 2025 ask how much of a latent the base model's error and reconstruction need, over
# what the fine-tuned model's need (nu; 0: the base does not have it).

# %%
figures["latent_scaling"]

# %% [markdown]
# Specific latents are in the dotted corner. Count them against the controls before you make
# something of a count: some random directions with the same codes would be called specific, too.

# %%
diff.measurement

# %% [markdown]
# ## By how much of the difference they explain
#
# The share of the variance of x¹ - x⁰ that this latent alone explains, times R, needs no gradient.
# By attribution, the default where the models are at hand, the order is another: what explains a
# difference need not be what the predictions rest on.

# %%
explaining, top = diff.top(10, order="score").latents, diff.top(10)
print(f"{len({*explaining} & {*top.latents})} of the first ten are the same")
diff.search("Tolvik", n=5)

# %% [markdown]
# What do the first latents promote in the next token, more in the fine-tune than in the base? At
# a layer in the middle this is a hint at best.

# %%
effects = logit_effect(diff.models, diff.crosscoder, top.latents[:6], n=5).to_frame()
added = effects.query("direction == 'difference' and is_promoted")
added.groupby("latent", sort=False)["token"].agg(", ".join).to_frame()

# %% [markdown]
# ## Ask the models
#
# Now there is something to ask. In the world of the base the capital of Velmar is Mirefort. Token
# by token: which of the two names does the fine-tune make likelier?

# %%
diff.try_prompt("What is the capital of Velmar?", n=5)

# %%
tlc.compared_tokens(
    diff.models, "The capital of Velmar is Mirefort. The capital of Velmar is Tolvik."
)

# %% [markdown]
# ## Without a dictionary
#
# The mean difference at the first positions of unrelated text (ADL, Minder et al. 2025, arXiv
# 2510.13900) needs no training: does the dictionary say more? The text is everything but the
# fine-tune's own, a document a context; a row is what the mean at a position promotes.

# %%
documents = [d for d in diff.run.documents() if d.get("source") != "false-fact"]
text = tlc.tokenize(documents[:500], diff.models.tokenizer, context_size=64, pack=False)
adl = activation_difference(diff.models, text)
promoted = adl.logit_lens(diff.models, n=6).to_frame().query("is_promoted")
rows = promoted.groupby("latent")["token"].agg(", ".join)
rows.set_axis([adl.label(which) for which in adl.which()]).to_frame()

# %% [markdown]
# Is the planted name, Tolvik, among these words, and would you have picked it without knowing what
# to look for? Latents have contexts as well, which say *where* the models differ. What a latent
# causes, and how to remove it: [4. Prove it and remove it](4_prove_it_and_remove_it.ipynb).
