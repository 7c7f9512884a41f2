"""The recipes: `python recipes/NAME.py` in a clone of the repository, `hf-embed NAME` wherever the package is installed."""
