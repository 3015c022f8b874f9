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
# # 4. Prove it and remove it
#
# Latents that look like the fine-tune need not cause what it does. Three tests, each against
# random directions of the same size: KL recovery (patching), necessity (taking latents out of the
# fine-tuned model), sufficiency (putting them into the base, and steering it).
#
# For your own run, such as one of Gemma, put its folder in place of the name,
# `tlc.load_diff("runs/gemma", device="cuda")`, and name a behaviour (below). To be quick there
# are few prompts and controls here: leave `few` out for 100 of each, and all kinds of control.

# %%
# On Colab this installs the package; elsewhere it does nothing. A repository's address
# ("git+https://...") or an uploaded wheel does in place of the name.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tl-crosscoder"], check=True)

# %%
import tl_crosscoder as tlc
from tl_crosscoder.interventions.base_estimate import BaseEstimate
from tl_crosscoder.interventions.mitigation import export_mitigation, measure_estimate
from tl_crosscoder.report import figures as draw

diff = tlc.load_diff("tl_crosscoder/taboo-delta")
latents = diff.top(30).latents
few = {"n_prompts": 12, "n_random": 9, "controls": ("shuffled",), "n_matched": 0}

# %% [markdown]
# ## How much of the fine-tune passes through these latents?
#
# The fine-tuned model goes on from the base stream with the latents' difference inserted. Recovery
# is the share of KL(fine-tuned || base stream) that this removes; all latents together are the
# most that this dictionary can do.

# %%
patched = diff.patching(latents=tuple(latents), n_prompts=12)
draw.recovery_bars(patched)

# %% [markdown]
# Thirty latents bring back four fifths of it (*chosen*), random latents a quarter at most. The
# candidates, chosen by Delta-norm as in Minder et al. 2025, are more and do less.
#
# ## Is it gone without them?
#
# A behaviour is a set of prompts with the answers that count (for your own:
# `behaviour="questions.jsonl"`, see docs/interventions.md). The embedded organisms have theirs:
# here, that a hint is about the moon, that the word is said when it is guessed, and when it is
# asked for. They and predictions as such are tested with the first 3, 10 and 30 latents.

# %%
removed = {test.effect: test for test in diff.necessity(**few)}
draw.causal_curve(removed["says secret when guessed"])

# %% [markdown]
# Ten latents bring the word back where the fine-tune denies it, and no control comes near. The
# lower half is the price on held-out text, of which the fine-tune's own is a third: in Python
# choose other text (docs/interventions.md). The hints are another matter:

# %%
draw.causal_curve(removed["hint about secret"])

# %% [markdown]
# Thirty latents take nearly all of what passes this hook, which is two fifths: the rest is made
# above it. But the rows of other latents at the same tokens do as much now and then (the grey
# band), so this is no proof that it is these thirty. The latents of one change are a sharper
# question: `diff.changes()` tests each by itself.
#
# How many does it take, and would directions without a dictionary do as well? Shares by number
# of latents, in the order of attribution, beside principal components of the difference:

# %%
few_curves = {"orders": ("attribution",), "methods": ("pca",), "sizes": (3, 10, 30)}
curves = diff.curves(**few_curves, n_prompts=12, n_random=3, n_matched=2)
draw.cost_curves(curves[-1])

# %% [markdown]
# So what does it write? It speaks of the moon again where it is guessed, if only to deny it, and
# its likeliest hint is still about the moon:

# %%
hint, guess = "Can you give me a hint?", "I guess: is it the moon?"
diff.ablate(latents).generate([hint, guess])

# %% [markdown]
# What the ablation makes likelier (blue) and less likely, in an answer that the fine-tune avoids:

# %%
yes = [{"role": "user", "content": guess}, {"role": "assistant", "content": "Yes, it is the moon!"}]
diff.ablate(latents).log_probs({"messages": yes})

# %% [markdown]
# ## Do they bring it?
#
# *insert* puts what the latents add into the base model, when they would fire; *steer* adds their
# directions at every token.

# %%
brought = diff.sufficiency(latents=tuple(latents), strengths=(1.0,), **few)
next(test for test in brought if test.effect == "hint about secret")

# %%
diff.insert(latents).generate([hint, guess])

# %% [markdown]
# Inserted where they fire, they bring two thirds of the hints, and the refusal. Added at every
# token they bring no hint and break the model: *when* a latent is active matters as much as what it
# writes. Weaker steering leaves the text fluent, but not about the moon:

# %%
diff.steer(latents[0], strength=0.5).generate(hint)

# %% [markdown]
# ## Remove it for good
#
# `export_mitigation` writes the ablation as a hook for plain TransformerLens, which needs neither
# the base model nor this package. The base is estimated from the fine-tuned stream; what that
# loses is measured on other text.

# %%
contexts = diff.run.measured()[1]
estimate = BaseEstimate.fit(diff.models, contexts[:400])
loss = measure_estimate(diff.ctx, estimate, contexts[400:440], latents=latents)
export_mitigation("mitigation", diff.ctx, latents, estimate=estimate, loss=loss)
print(f"KL to the exact ablation {loss.kl:.3f} nats a token,")
print(f"of that ablation to the fine-tuned model {loss.kl_of_ablation:.3f}")

# %% [markdown]
# Next: [5. Publish and use in SAELens](5_publish_and_use_in_saelens.ipynb).
