"""Hooks on the models: do the latents cause the behaviour, and what does removing them cost?"""
