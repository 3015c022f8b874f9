"""Dictionaries in the formats of other tools: SAEDashboard, Neuronpedia, delphi."""
