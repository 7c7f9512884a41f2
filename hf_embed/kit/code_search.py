"""Code search: each docstring is a query, and the function that it describes is the relevant document."""

import os

from hf_embed.data.sources import read_file, texts_of
from hf_embed.errors import InputError
from hf_embed.evaluation.retrieval import Retrieval, pairs_to_retrieval
from hf_embed.kit.docstrings import read_definitions

# Names of the columns in CodeSearchNet and in its copies.
DOCSTRINGS = ("docstring", "func_documentation_string", "query")
CODES = ("code", "func_code_string")


def read_code_search(path: str) -> Retrieval:
    """Read docstrings (queries) and the functions that they describe (documents).

    Args:
        path: a jsonl file with the columns docstring and code, as in CodeSearchNet, or the folder or the name of a Python
            package.

    Raises:
        InputError: if the file does not have these columns, or if there is no function with a docstring.
    """
    if "://" not in path and not os.path.isfile(path):
        pairs = [(d.summary, d.code) for d in read_definitions(path) if d.code]
    else:
        rows = read_file(path)
        docstring, code = (next((c for c in names if c in rows.column_names), None) for names in (DOCSTRINGS, CODES))
        if docstring is None or code is None:
            raise InputError(f"{path}: found the columns {', '.join(rows.column_names)}; code search needs docstring and code")
        pairs = [(query, document) for query, document in texts_of(rows, [docstring, code], path)]
    if not pairs:
        raise InputError(f"{path}: there is no function with a docstring; give another file or package")
    return pairs_to_retrieval(pairs)
