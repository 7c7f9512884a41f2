"""Is the encoder any good? Evaluation sets are tasks: objects with `score(embed)`."""
