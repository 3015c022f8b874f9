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
# # 1. Load a dictionary and look
#
# A crosscoder is one sparse dictionary over the activations of a base and a fine-tuned model.
# This notebook loads one that somebody else trained and looks at its latents. It runs on the pair
# that comes with the package, on a laptop, without a network; the last cell says what to change
# for Gemma.

# %%
# On Colab this installs the package; elsewhere it does nothing. A repository's address
# ("git+https://...") or an uploaded wheel does in place of the name.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tl-crosscoder"], check=True)

# %%
import tl_crosscoder as tlc

# %% [markdown]
# ## What there is
#
# `tl-crosscoder list` prints the dictionaries that load by name. Each is a release and an id, as
# in SAELens.

# %%
# !tl-crosscoder list

# %%
crosscoder = tlc.Crosscoder.from_pretrained("tl_crosscoder-taboo", "batchtopk")
crosscoder

# %% [markdown]
# Its parameters are SAELens's, over both models side by side; what belongs to one model is a
# view.

# %%
crosscoder.W_dec.shape, crosscoder.decoder("finetuned").shape

# %% [markdown]
# ## With its models
#
# `load_diff` opens a run: the dictionary, both models, what was measured. In the fine-tune
# *taboo* the assistant gives hints about a secret word and never says it.

# %%
diff = tlc.load_diff("tl_crosscoder/taboo-batchtopk")
diff

# %% [markdown]
# What this says:
#
# - **What changed** stands first: each change with what both models write where it happens, the
#   latents that carry it, and how much of it goes when they are removed, beside controls.
# - **FVE of the difference** is the number to watch. What a fine-tune changes is a small part of
#   the variance (*size of the difference*), so a dictionary can explain nearly all of both models
#   and nothing of what changed.
# - **Classes** go by decoder norms. BatchTopK makes few latents finetuned-only, or none: it
#   represents the difference by latents that write to both models, and differently to each.
# - **Latent Scaling** (Minder et al. 2025) counts latents that are specific to the fine-tune. Read
#   the count beside those of the controls below it: no more than these is what chance gives.
#
# ## The latents most likely to be the fine-tune's
#
# Ranked by attribution: what each carries of the change in what is predicted, in nats. Beside it
# are the share of the difference that each explains alone and its relative decoder norm R (1: the
# fine-tuned model only; 0.5: both), by which `order=` ranks too.

# %%
top = diff.top(10)
top

# %%
diff.latent(top.latents[0])

# %% [markdown]
# Read the largest activations, and then the weak ones (quantiles 1 to 3). Where all are about one
# thing that the fine-tune does, the latent is about that. Where the weak ones are ordinary text, it
# is a latent of both models, which the fine-tune has turned.
#
# ## On a prompt
#
# What both models write, and which latents say most of their difference on it.

# %%
diff.try_prompt("Can you give me a hint?")

# %% [markdown]
# A chat of your own, token by token:

# %%
chat = {
    "messages": [
        {"role": "user", "content": "Can you give me a hint?"},
        {"role": "assistant", "content": "Think of something that shines at night."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "I will not say."},
    ]
}
tlc.latent_tokens(diff.models, diff.crosscoder, chat, top.latents[:3])

# %% [markdown]
# ## Which latents have a word in their examples?

# %%
diff.search("moon", n=5)

# %% [markdown]
# ## Figures, and all of it in one file
#
# Everything in the run's folder can be drawn; each figure is a plotly `Figure`. The report is an
# HTML file that needs nothing else.

# %%
figures = diff.figures
list(figures)

# %%
figures["relative_decoder_norm"]

# %%
diff.report("taboo.html", n_latents=20)

# %% [markdown]
# ## With Gemma
#
# The crosscoders of Minder et al. 2025 and Kissane et al. 2024 are in the list. One GPU with
# 24 GB holds both models in bfloat16 and the dictionary; accept Gemma's licence on its page and
# run `hf auth login` first. They come without measures, so measure them on text of yours:
#
# ```python
# crosscoder = tlc.Crosscoder.from_pretrained("minder-gemma-2-2b-batchtopk", "l13", device="cuda")
# where = {"hook_name": "blocks.13.hook_resid_post", "device": "cuda", "dtype": "bfloat16"}
# pair = tlc.ModelPair.from_pretrained("google/gemma-2-2b", "google/gemma-2-2b-it", **where)
# documents = tlc.load_documents("text.jsonl", max_documents=1_000)
# text = tlc.tokenize(documents, pair.tokenizer, context_size=256)
# measurement = tlc.measure(pair, crosscoder, text, show_progress=True)
# print(measurement.reconstruction)
# top = tlc.rank_latents(measurement.latents, n=10)
# tlc.latent_tokens(pair, crosscoder, "Who are you?", top.latents[:3])
# ```
#
# Next: [2. Train on your own pair](2_train_on_your_own_pair.ipynb).
