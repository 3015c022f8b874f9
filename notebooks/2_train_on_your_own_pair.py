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
# Two models, a hook point and text make a dictionary. The cells below take two minutes on a
# laptop; with the settings in the next cell they take whatever pair you have.

# %%
# On Colab this installs the package; elsewhere it does nothing.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tl-crosscoder"], check=True)

# %%
import tl_crosscoder as tlc

# %% [markdown]
# ## The pair
#
# For Gemma, put these in place (one GPU with 24 GB; a file of your own text, a tenth or more of
# it of the kind that the fine-tune is about):
#
# ```python
# models = {"base": "google/gemma-2-2b", "finetuned": "google/gemma-2-2b-it"}
# models |= {"device": "cuda", "dtype": "bfloat16"}
# hook_name, text = "blocks.13.hook_resid_post", "text.jsonl"
# size = {"d_sae": 36_864, "k": 100, "n_tokens": 50_000_000, "batch_size": 4096, "lr": 1e-4}
# ```
#
# A LoRA adapter stands in place of `finetuned` as `adapter=`, and loaded TransformerLens models
# in place of names.

# %%
models = {"base": "tl_crosscoder/world-base", "adapter": "tl_crosscoder/taboo"}
hook_name, text = "blocks.2.hook_resid_post", "tl_crosscoder/taboo"
size = {"d_sae": 512, "k": 12, "n_tokens": 150_000, "batch_size": 1024, "lr": 2e-3}

# %% [markdown]
# ## Train and measure
#
# Whatever stops it, the same call with `resume=True` goes on at the last checkpoint.

# %%
diff = tlc.diff(**models, hook_name=hook_name, text=text, output="runs/batchtopk", **size)
diff

# %% [markdown]
# Is it trained? Loss and FVE should have levelled off; where dead latents grow, lower the
# learning rate or use fewer.

# %%
figures = diff.figures
figures["training"]

# %% [markdown]
# ## Another dictionary
#
# Twelve presets (`docs/dictionaries`) are combinations of the same parts. Delta-Crosscoder gives
# some latents the task of saying the difference.

# %%
delta = tlc.diff(
    **models,
    hook_name=hook_name,
    text=text,
    preset="delta",
    delta_loss_weight=1.0,
    output="runs/delta",
    **size,
)
for name, each in {"batchtopk": diff, "delta": delta}.items():
    r = each.measurement.reconstruction
    sites = ", ".join(f"{site} {value:.3f}" for site, value in r.fve.items())
    print(f"{name:<10} FVE {sites}; of the difference {r.difference_fve:.3f}; L0 {r.l0:.1f}")

# %% [markdown]
# ## Do two dictionaries agree?
#
# A latent that another seed or another method finds again is easier to believe.

# %%
agreement = tlc.agreement_over_seeds([diff.crosscoder, delta.crosscoder])
agreement

# %% [markdown]
# ## By hand
#
# `diff` is a short way of saying what these pieces do, and each can be had alone.

# %%
where = {name: value for name, value in models.items() if name != "base"}
pair = tlc.ModelPair.from_pretrained(models["base"], hook_name=hook_name, **where)
documents = tlc.split_documents(tlc.load_documents("runs/batchtopk/held_out.jsonl"))
train_on, held_out = (tlc.tokenize(d, pair.tokenizer, context_size=64) for d in documents)
config = tlc.TrainConfig(d_sae=256, n_tokens=20_000, batch_size=512, lr=2e-3)
recipe = tlc.Recipe(sparsity=tlc.TopK(k=8))
trainer = tlc.Trainer(pair, train_on, held_out, config=config, recipe=recipe, output="runs/by-hand")
crosscoder = trainer.fit()
tlc.measure(pair, crosscoder, held_out).reconstruction

# %% [markdown]
# The folders in `runs/` are what the command line opens: `tl-crosscoder analyze runs/batchtopk`.
# Next: [3. Find what fine-tuning changed](3_find_what_changed.ipynb).
