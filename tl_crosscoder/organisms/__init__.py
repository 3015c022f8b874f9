"""Model pairs whose difference is known, as data: the default pairs of the package.

    organism("taboo")       # suite: base, adapter, text, questions, what was planted
    measure("taboo")        # scores: what both models do, as exact probabilities
    planted_recovery(...)   # recovery: whether a dictionary shows what was planted

How they are made is in `pretrained/recipes`, outside the wheel.
"""
