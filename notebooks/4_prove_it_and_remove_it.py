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
# *Chosen* are the thirty latents by attribution, *candidates* those that Minder et al. 2025 take by
# Delta-norm; random latents stand beside them.
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
# The upper half says how much of the behaviour goes with so many latents, and what the controls
# (the grey band) take: a share inside the band proves nothing. The lower half is the price on
# neutral text. Another behaviour of the same fine-tune can be another matter:

# %%
draw.causal_curve(removed["hint about secret"])

# %% [markdown]
# The dashed line is what passes this hook at all; the rest is made above it. Where the controls do
# as much, there is no proof that it is these latents: those of one change are a sharper question,
# and `diff.changes()` tests each by itself.
#
# How many does it take, and would directions without a dictionary do as well? Shares by number
# of latents, in the order of attribution, beside principal components of the difference:

# %%
few_curves = {"orders": ("attribution",), "methods": ("pca",), "sizes": (3, 10, 30)}
curves = diff.curves(**few_curves, n_prompts=12, n_random=3, n_matched=2)
draw.cost_curves(curves[-1])

# %% [markdown]
# So what does it write, when asked for a hint, and when the word is guessed?

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
# Compare the two: *when* a latent is active can matter as much as what it writes, and a direction
# that is added at every token can break the model before it brings the behaviour. Weaker steering:

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
