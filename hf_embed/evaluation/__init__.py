"""Is the encoder any good? STS, alignment and uniformity."""

import sys
from pathlib import Path

# A recipe run as a script has recipes/ first on its path, and there recipes/evaluate.py would be taken for the library
# `evaluate`. Import the library once, without such a folder; every later `import evaluate` gets it.
_path = sys.path[:]
sys.path[:] = [folder for folder in _path if not Path(folder, "evaluate.py").is_file()]
try:
    import evaluate  # noqa: F401
finally:
    sys.path[:] = _path
