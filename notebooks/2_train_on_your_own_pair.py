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
# # 2. Train on your own pair
#
# Two models, a hook point and text make a dictionary. The cells below take a minute on a laptop;
# with the settings in the next cell they take whatever pair you have.

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
# ## The pair
#
# For Gemma, put these in place (one GPU with 24 GB; text of your own, a tenth or more of it of
# the kind that the fine-tune is about):
#
# ```python
# models = {"base": "google/gemma-2-2b", "finetuned": "google/gemma-2-2b-it"}
# models |= {"device": "cuda", "dtype": "bfloat16"}
# hook_name, text = "blocks.13.hook_resid_post", tlc.load_documents("text.jsonl")
# size = {"d_sae": 36_864, "n_tokens": 50_000_000, "batch_size": 4096, "lr": 1e-4}
# k = 100
# ```
#
# A LoRA adapter stands in place of `finetuned` as `adapter=`, and loaded TransformerLens models
# in place of names. `tl-crosscoder train ... --dry-run` prints what a run takes.

# %%
models = {"base": "tl_crosscoder/world-base", "adapter": "tl_crosscoder/taboo"}
hook_name = "blocks.2.hook_resid_post"
text = tlc.load_documents("tl_crosscoder/taboo", max_documents=4_000)
size = {"d_sae": 512, "n_tokens": 200_000, "batch_size": 512, "lr": 2e-3}
k = 12

# %% [markdown]
# ## At which layer?
#
# What of the change passes each layer says where a dictionary can find it: the base's activation
# is put into the fine-tuned model, and what this leaves of the KL between them is what passes. No
# dictionary is needed. `train` does this by itself where no hook is named.

# %%
scanned = tlc.scan(**models, text=text, n_prompts=40)
scanned

# %% [markdown]
# ## Train and measure
#
# Whatever stops it, the same call with `resume=True` goes on at the last checkpoint. A tenth of
# the documents is held out, for the thresholds and all measures.

# %%
diff = tlc.diff(**models, hook_name=hook_name, text=text, k=k, output="runs/batchtopk", **size)
diff

# %% [markdown]
# *What changed* stands first: each change with what both models write there, the latents that
# carry it, and what removing them undoes beside controls. How much of that would a pair without a
# change show? `diff.floor()` fine-tunes the base on its own samples and asks the same of it.
#
# Is it trained? Loss and FVE should have levelled off. Where the FVE of the difference still
# rises, more tokens and more latents raise it: the dictionary of
# [notebook 1](1_load_and_look.ipynb) had five times the tokens and twice the latents. Where dead
# latents grow, lower the learning rate or use fewer.

# %%
diff.figures["training"]

# %% [markdown]
# ## By hand, and another dictionary
#
# `diff` is a short way of saying what these pieces do, and each can be had alone. Twelve presets
# (`docs/dictionaries`) are combinations of the same parts. Delta-Crosscoder (Kassem et al. 2026)
# gives some latents the task of saying the difference; its loss weighs 1 here, and 0.005 in the
# paper, at which it changes little on this pair.

# %%
pair = diff.models
training, held_out = (
    tlc.tokenize(documents, pair.tokenizer, context_size=128)
    for documents in tlc.split_documents(text)
)
recipe = tlc.preset("delta", k=k, delta_loss_weight=1.0)
how = {"config": tlc.TrainConfig(**size), "recipe": recipe, "output": "runs/delta"}
delta = tlc.Trainer(pair, training, held_out, **how).fit()
measured = tlc.measure(pair, delta, held_out)

# %%
for name, found in {"batchtopk": diff.measurement, "delta": measured}.items():
    r = found.reconstruction
    sites = ", ".join(f"{site} {value:.3f}" for site, value in r.fve.items())
    print(f"{name:<10} FVE {sites}; of the difference {r.difference_fve:.3f}; L0 {r.l0:.1f}")

# %% [markdown]
# ## Do two dictionaries agree?
#
# A latent that another seed or another method finds again is easier to believe. Of the ten
# first latents of each, how near is the nearest in the other dictionary (MMCS), and beside it the
# same of all latents: a top ten that agrees less than the rest is not a finding.

# %%
tops = [tlc.rank_latents(m.latents, n=10).latents for m in (diff.measurement, measured)]
dictionaries = [diff.crosscoder, delta]
print(tlc.agreement_over_seeds(dictionaries, subsets=tops).to_frame().to_string())
print(tlc.agreement_over_seeds(dictionaries).to_frame().to_string())

# %% [markdown]
# Where the first ten agree more than all latents do, both found much the same of the fine-tune.
#
# The folders in `runs/` are what the command line opens: `tl-crosscoder analyze runs/batchtopk`.
# Next: [3. Find what fine-tuning changed](3_find_what_changed.ipynb).
