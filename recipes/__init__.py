"""The recipes. Run `python recipes/NAME.py` in a clone of the repository, or `hf-embed NAME` with the installed package."""
