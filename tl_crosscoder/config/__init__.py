"""Settings: torch-free dataclasses, read from YAML and the command line."""
