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
# Which of a thousand latents belong to the fine-tune? Norms, Latent Scaling and the difference
# itself give answers, which do not agree. The embedded fine-tune *false-fact* believes one wrong
# thing about an invented country; pretend not to know which.
#
# For your own run, put its folder in place of the name in the next cell:
# `tlc.load_diff("runs/gemma", device="cuda")`.

# %%
# On Colab this installs the package; elsewhere it does nothing.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tl-crosscoder"], check=True)

# %%
import tl_crosscoder as tlc

diff = tlc.load_diff("tl_crosscoder/false-fact-batchtopk")
print(diff)

# %% [markdown]
# ## By decoder norm
#
# R is 1 where only the fine-tuned model is written to. Kassem et al. take the largest; with
# BatchTopK nearly all latents write to both models.

# %%
figures = diff.figures
figures["relative_decoder_norm"]

# %%
diff.top(5, by="relative_decoder_norm")

# %% [markdown]
# ## By Latent Scaling
#
# Minder et al. ask how much of a latent the base model's error and reconstruction need, over what
# the fine-tuned model's need (nu; 0: the base does not have it). The controls say how many latents
# look specific by chance: compare the rows before you count.

# %%
figures["latent_scaling"]

# %% [markdown]
# ## By what they say of the difference
#
# The default: the share of the variance of x¹ - x⁰ that goes when only this latent speaks, times
# R.

# %%
top = diff.top(10)
top

# %% [markdown]
# ## Look at them

# %%
diff.latent(top.latents[0])

# %% [markdown]
# What do they promote in the next token, in each model?

# %%
tlc.logit_effect(diff.models, diff.crosscoder, top.latents[:5], n=6)

# %% [markdown]
# ## Ask the models
#
# What the two models think of a text, token by token: log-probabilities in each, and their
# difference.

# %%
question = diff.run.documents()[0]
tlc.compared_tokens(diff.models, question)

# %% [markdown]
# ## Without a dictionary
#
# The mean difference at the first positions of any text (ADL, 2025) and principal components need
# no training: does the dictionary say more?

# %%
_, text = diff.run.measured()
adl = tlc.activation_difference(diff.models, text)
adl.logit_lens(diff.models, n=8)

# %% [markdown]
# None of this shows that a latent *causes* anything: [4. Prove it and remove
# it](4_prove_it_and_remove_it.ipynb).
