"""Code search: each docstring is a query, and the function that it describes is the relevant document."""

import os

from hf_embed.data.sources import texts_of
from hf_embed.errors import InputError
from hf_embed.evaluation.retrieval import Retrieval, pairs_to_retrieval
from hf_embed.evaluation.rows import read_layout
from hf_embed.kit.docstrings import read_definitions

# Plain names of the columns in CodeSearchNet and in its copies.
LAYOUTS = [(text, code) for text in ("docstring", "funcdocumentationstring", "query") for code in ("code", "funccodestring")]


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
        rows, _ = read_layout(path, LAYOUTS)
        pairs = [(query, document) for query, document in texts_of(rows, rows.column_names, path)]
    if not pairs:
        raise InputError(f"{path}: there is no function with a docstring; give another file or package")
    return pairs_to_retrieval(pairs)
