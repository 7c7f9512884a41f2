class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where and how to mend it, in one line."""


class RankError(InputError):
    """One that a single process may meet in the middle of a run, so that it has to say so itself."""
