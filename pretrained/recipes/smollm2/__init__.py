"""Recipes of the organisms on SmolLM2-135M-Instruct, a real model: text, questions, adapters."""
