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
# For your own run, put its folder in place of the name: `tlc.load_diff("runs/gemma",
# device="cuda")`, and name a behaviour (below).

# %%
# On Colab this installs the package; elsewhere it does nothing.
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "tl-crosscoder"], check=True)

# %%
import tl_crosscoder as tlc
from tl_crosscoder.visualize import figures as draw

diff = tlc.load_diff("tl_crosscoder/taboo-batchtopk")
latents = diff.top(30).latents
latents[:10]

# %% [markdown]
# ## How much of the fine-tune passes through these latents?
#
# The fine-tuned model goes on from the base stream with the latents' difference put in. Recovery
# is the share of KL(fine-tuned || base stream) that goes; all latents together are the most that
# this dictionary can do.

# %%
patched = diff.patching(latents=tuple(latents), n_prompts=30)
patched

# %%
draw.recovery_bars(patched)

# %% [markdown]
# ## Is it gone without them?
#
# A behaviour is a set of prompts with the answers that count (for your own:
# `behaviour="questions.jsonl"`, see docs/interventions.md). The embedded organisms have theirs.

# %%
removed = diff.necessity(latents=tuple(latents), n_prompts=30, n_random=20, n_matched=2)
removed[-1]

# %%
hint = "Can you give me a hint?"
diff.ablate(latents).generate([hint, "I guess: is it the moon?"])

# %%
diff.ablate(latents).log_probs("A hint: it shines at night.")

# %% [markdown]
# ## Do they bring it?

# %%
brought = diff.sufficiency(latents=tuple(latents), n_prompts=30, n_random=20, n_matched=2)
brought[-1]

# %%
diff.insert(latents).generate(hint)

# %%
diff.steer(latents[0], strength=2).generate(hint)

# %% [markdown]
# ## Take it away for good
#
# `export_mitigation` writes the ablation as a hook for plain TransformerLens, which needs neither
# the base model nor this package; what its estimate of the base loses is measured.

# %%
contexts = diff.run.measured()[1]
estimate = tlc.BaseEstimate.fit(diff.models, contexts[:400])
loss = tlc.measure_estimate(diff.subject, estimate, contexts[400:440], latents=latents)
tlc.export_mitigation("mitigation", diff.subject, latents, estimate=estimate, loss=loss)
print(f"KL to the exact ablation {loss.kl:.3f} nats a token,")
print(f"of that ablation to the fine-tuned model {loss.kl_of_ablation:.3f}")

# %% [markdown]
# ## All of it in one file

# %%
diff.report("taboo.html", n_latents=20)

# %% [markdown]
# Next: [5. Publish and use in SAELens](5_publish_and_use_in_saelens.ipynb).
