"""Evaluation of an encoder. Each evaluation set is a task: an object with `score(embed)`."""
