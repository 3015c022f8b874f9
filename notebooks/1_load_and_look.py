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
# On Colab this installs the package; elsewhere it does nothing.
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
print(
    "W_dec",
    list(crosscoder.W_dec.shape),
    "of which the fine-tuned model's:",
    list(crosscoder.decoder("finetuned").shape),
)

# %% [markdown]
# ## With its models
#
# `load_diff` opens a run: the dictionary, both models, what was measured. In the fine-tune
# *taboo* the assistant gives hints about a secret word and never says it.

# %%
diff = tlc.load_diff("tl_crosscoder/taboo-batchtopk")
diff

# %% [markdown]
# The FVE of the difference is the number to watch: a dictionary can explain 99 % of both models
# and nothing of what changed.
#
# ## The latents most likely to be the fine-tune's
#
# Ranked by the share of the difference that each says alone, times its relative decoder norm (1:
# the fine-tuned model only; 0.5: both).

# %%
top = diff.top(10)
top

# %%
diff.latent(top.latents[0])

# %% [markdown]
# ## On a prompt

# %%
diff.try_prompt("Can you give me a hint?")

# %%
tlc.latent_tokens(diff.models, diff.crosscoder, "A hint: it shines at night.", top.latents[:3])

# %% [markdown]
# ## Which latents have a word in their examples?

# %%
diff.search("moon", n=5)

# %% [markdown]
# ## Figures
#
# Everything in the run's folder can be drawn; each figure is a plotly `Figure`.

# %%
figures = diff.figures
list(figures)

# %%
figures["relative_decoder_norm"]

# %% [markdown]
# ## With Gemma
#
# The crosscoders of Minder et al. 2025 and Kissane et al. are in the list. One GPU with 24 GB
# holds both models in bfloat16:
#
# ```python
# crosscoder = tlc.Crosscoder.from_pretrained("minder-gemma-2-2b-batchtopk", "l13", device="cuda")
# where = {"hook_name": "blocks.13.hook_resid_post", "device": "cuda", "dtype": "bfloat16"}
# pair = tlc.ModelPair.from_pretrained("google/gemma-2-2b", "google/gemma-2-2b-it", **where)
# tlc.latent_tokens(pair, crosscoder, "Who are you?", [3, 17])
# text = tlc.tokenize(tlc.load_documents("text.jsonl"), pair.tokenizer, context_size=256)
# measurement = tlc.measure(pair, crosscoder, text)
# ```
