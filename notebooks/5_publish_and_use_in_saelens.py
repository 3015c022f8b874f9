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
# # 5. Publish, and use in SAELens
#
# A dictionary that nobody can load does not exist. This notebook writes one for SAELens alone,
# attaches it at one site to a model, and shows what would be published. With your own run, such
# as one of Gemma, put its folder in place of the name: `tlc.load_diff("runs/gemma",
# device="cuda")`, and `publish runs/gemma`.

# %%
# On Colab this installs the package; elsewhere it does nothing. A repository's address
# ("git+https://...") or an uploaded wheel does in place of the name.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tl-crosscoder"], check=True)

# %%
import torch
from sae_lens import SAE

import tl_crosscoder as tlc
from tl_crosscoder.analysis.saelens_evals import SiteSAE, sae_bridge
from tl_crosscoder.models.saelens import HookedSite

diff = tlc.load_diff("tl_crosscoder/taboo-batchtopk")
tokens = diff.models.to_tokens(["A hint: it shines at night.", "What is the capital?"])
x = diff.models.activations(tokens)
codes = diff.crosscoder.encode(x)
diff.crosscoder

# %% [markdown]
# ## Without this package
#
# A crosscoder with a threshold is a JumpReLU SAE over both models' activations side by side.
# These folders need SAELens alone; each has a card that says what it is.

# %%
tlc.export_concat("exports/concat", diff.crosscoder)
sae = SAE.load_from_disk("exports/concat")
print(
    type(sae).__name__, "same active latents:", torch.equal(sae.encode(x.flatten(2)) > 0, codes > 0)
)

# %% [markdown]
# From both models to one, also exactly:

# %%
tlc.export_transcoder("exports/finetuned", diff.crosscoder, site="finetuned")
transcoder = SAE.load_from_disk("exports/finetuned")
print(type(transcoder).__name__, list(transcoder(x.flatten(2)).shape))

# %% [markdown]
# From one model alone it is an approximation, since the other model has to be estimated. What
# that costs is measured on other text and written in the card.

# %%
_, text = diff.run.measured()
quality = tlc.export_site(
    "exports/site", diff.crosscoder, source=diff.models, fit_on=text[:600], measure_on=text[600:900]
)
print(f"FVU {quality.fvu:.3f} (crosscoder {quality.fvu_of_crosscoder:.3f}), "
      f"active latents in common {quality.jaccard:.0%}")  # fmt: skip

# %% [markdown]
# ## On a model with SAELens
#
# `SiteSAE` is an SAE of SAELens whose codes are the crosscoder's: it asks the other model for its
# activations. `HookedSAETransformer` and `SAETransformerBridge` take it like any other;
# `sae_bridge` gives SAELens a model that is loaded already.

# %%
model = sae_bridge(diff.models.model("finetuned"))
site_sae = SiteSAE(diff.crosscoder, HookedSite(diff.models, "finetuned"))
logits, cache = model.run_with_cache_with_saes(tokens, saes=[site_sae], use_error_term=True)
name = model.get_sae_hook_name(site_sae, "hook_sae_acts_post")
print(name, "holds the crosscoder's codes:", torch.allclose(cache[name], codes, atol=1e-4))

# %% [markdown]
# ## Publish
#
# Without `--push` nothing is sent: it shows every file, and the card as it would stand.

# %%
# !tl-crosscoder publish tl_crosscoder/taboo-batchtopk --repo you/taboo-crosscoders --license mit

# %% [markdown]
# After `--push`, others load it with
#
# ```python
# tlc.Crosscoder.from_pretrained("you/taboo-crosscoders", "taboo-batchtopk")
# ```
#
# ## From other libraries
#
# Dictionaries of dictionary_learning, of Kissane et al. and of crosscode are read from a folder
# or from the hub; what their files do not say is asked for:
#
# ```python
# crosscoder = tlc.convert(
#     "ckkissane/crosscoder-gemma-2-2b-model-diff/blocks.14.hook_resid_pre",
#     base="google/gemma-2-2b",
#     finetuned="google/gemma-2-2b-it",
#     scales=(0.2759, 0.2442),  # of the activations; their notebook alone has them
# )
# crosscoder.save("imported/kissane")
# ```
