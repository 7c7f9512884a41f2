"""Tokenize once: rows of text to an Arrow table of token ids and text hashes, which `datasets` caches on disk."""

import hashlib
import logging

from datasets import Dataset

from hf_embed.data.sources import row_texts, text_columns
from hf_embed.errors import InputError

logger = logging.getLogger(__name__)

# Above this share of cut texts a run says so.
TRUNCATION_WARNING = 0.05


def text_id(text: str) -> int:
    """A 64-bit hash of a text, never 0; equal texts have equal ids on every rank and machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True) or 1


def tokenize_rows(
    rows: Dataset,
    tokenizer,
    max_length: int,
    name: str = "train_dataset",
    paired: bool | None = None,
    prompts: dict[str, str] | None = None,
    drop_empty_rows: bool = False,
) -> Dataset:
    """Tokenize text rows into the columns `input_ids` (per row a list per text) and `text_ids` (per row a hash per text).

        {"anchor": "a cat", "positive": "a kitten", "negative": "a dog"}
        -> {"input_ids": [[101, 1037, 4937, 102], [101, 1037, 18401, 102], [101, 1037, 3899, 102]],
            "text_ids": [6027..., -1185..., 7743...], "cut": 0}

    `cut` counts the row's texts that were longer than `max_length` tokens. Prompts ("query" before anchors, "document"
    before the others) are tokenized but do not enter the hash: identity is the text's.
    Raises InputError for wrong columns or an empty text (see sources.py).
    """
    columns = text_columns(rows, name, paired)
    prompts = prompts or {}
    query, document = prompts.get("query", ""), prompts.get("document", "")

    def convert(batch: dict, numbers: list[int]) -> dict:
        out = {"input_ids": [], "text_ids": [], "cut": []}
        texts = []
        for i, number in enumerate(numbers):
            try:
                texts.append(row_texts({c: batch[c][i] for c in columns}, columns, f"{name}, row {number + 1}"))
            except InputError:
                if not drop_empty_rows:
                    raise
        flat = [(query if i == 0 else document) + text for row in texts for i, text in enumerate(row)]
        ids = tokenizer(flat, verbose=False)["input_ids"] if flat else []
        long = [i for i, text in enumerate(ids) if len(text) > max_length]
        if long:
            shortened = tokenizer([flat[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
            for i, text in zip(long, shortened):
                ids[i] = text
        was_long, start = set(long), 0
        for row in texts:
            stop = start + len(row)
            out["input_ids"].append(ids[start:stop])
            out["text_ids"].append([text_id(text) for text in row])
            out["cut"].append(len(was_long.intersection(range(start, stop))))
            start = stop
        return out

    tokens = rows.map(convert, batched=True, with_indices=True, remove_columns=rows.column_names, desc=f"Tokenizing {name}")
    if len(tokens) < len(rows):
        logger.warning(f"{name}: {len(rows) - len(tokens):,} of {len(rows):,} rows had an empty text and were dropped")
    if len(tokens) < 2:
        raise InputError(f"{name}: {len(tokens)} row(s); contrastive training needs at least 2, others are the negatives")
    columns = tokens.select_columns(["text_ids", "cut"])[:]
    share = sum(columns["cut"]) / sum(map(len, columns["text_ids"]))
    if share > TRUNCATION_WARNING:
        logger.warning(f"{name}: {share:.0%} of the texts were cut to max_length={max_length} tokens")
    return tokens
