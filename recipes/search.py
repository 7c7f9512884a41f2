"""Search the texts of a file: type a query, and read the nearest texts.

    python recipes/search.py outputs/mine texts.jsonl
    python recipes/search.py outputs/mine texts.jsonl --embeddings vectors.npy --top_k 10     # from recipes/encode.py
    python recipes/search.py outputs/mine texts.jsonl --query "how long do cats sleep" --query "warm places"

For each text, the recipe prints its score by the model's own similarity function, its row in the file (from 1), and the text.
An empty line or the end of the input ends the program. FILE may have any format that recipes/encode.py reads. Queries get the
model's prompt "query", texts its prompt "document".
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hf_embed import semantic_search
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.inference import FastEncodingArguments, document_vectors, load_for_encoding, read_column
from hf_embed.ranges import COUNT, check_ranges


@dataclass(kw_only=True)
class Arguments(FastEncodingArguments):
    """Flags of this recipe."""

    model_name_or_path: str = setting(REQUIRED, "Model folder or Hub name.", positional=True, metavar="MODEL")
    file: str = setting(REQUIRED, "File of the texts to search.", positional=True, metavar="FILE")
    column: str | None = setting(None, "Column of the texts. Default: text, sentence, or the only column.")
    embeddings: str | None = setting(None, "File with the vectors of the texts, written by recipes/encode.py.")
    query: list[str] = setting(
        [], "A query to answer. May be repeated. Without it, the recipe asks for queries.", action="extend"
    )
    top_k: int = setting(5, "Number of texts to print for each query.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"top_k": COUNT})


def main() -> None:
    """Load the model, encode the texts or read their vectors, and answer the queries."""
    (args,) = parse([Arguments])
    _, texts = read_column(args.file, args.column)
    encoder = load_for_encoding(args.model_name_or_path, args)
    vectors, options, similarity = document_vectors(encoder, texts, args.file, args.embeddings)
    room = 3 * shutil.get_terminal_size().columns if sys.stdout.isatty() else None  # show at most three lines of a text
    for query in args.query or typed():
        asked = np.asarray(encoder.encode_query(query, **options))
        if args.query or not sys.stdin.isatty():
            print(f"\n{query}")
        for hit in semantic_search(asked, vectors, args.top_k, similarity)[0]:
            number = int(hit["corpus_id"])
            print(f"  {hit['score']:7.3f}  row {number + 1:<7} {' '.join(texts[number].split())[:room]}", flush=True)


def typed() -> Iterator[str]:
    """Yield the lines that are typed or piped in, up to the first empty line."""
    asking = "\nquery> " if sys.stdin.isatty() else ""
    try:
        while query := input(asking).strip():
            yield query
    except (EOFError, KeyboardInterrupt):
        print()


if __name__ == "__main__":
    run(main)
