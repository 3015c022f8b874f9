"""The micro-world and the model pairs made from it; nothing here travels in the wheel.

    python pretrained/recipes/make.py --help

Text (`facts`, `phrases`, `stories`, `world`, `planted`, `questions`) needs no torch; `base` and
`finetune` train. The same seed gives the same text everywhere, and the same weights where
processor, torch and number of threads are the same.
"""
