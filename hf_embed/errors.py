class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where and how to mend it, in one line."""
