"""What a Jupyter user holds: `ModelDiff` and its views."""
