"""A preview of training rows as the model reads them: with prompts, truncated, and decoded from their token ids.

    as the model reads faq.csv: 3,040 rows, 12 of 9,120 texts truncated to 128 tokens
    row 1  anchor      18 tokens  the otters have come back to the city canal, thanks to clean...
           positive    21 tokens  less pollution has allowed those sleek mammals to return to ...
           negative    17 tokens  the otters have left the city canal because the water is so ...  (and 2 more)

`ContrastiveTrainer.preview` returns these lines.
"""

from itertools import islice
from typing import Any

from datasets import Dataset

from hf_embed.data.mixture import Mixture
from hf_embed.data.stream import Stream
from hf_embed.data.tokenization import count_texts
from hf_embed.encoder import Encoder
from hf_embed.errors import shortened
from hf_embed.forward.dropout import dropout_rates
from hf_embed.objectives import Objective

SHOWN_ROWS = 2
SHOWN_SOURCES = 6


def preview(rows: Dataset | Mixture, encoder: Encoder, name: str, same_dropout_mask: bool, objective: Objective) -> list[str]:
    """Return lines that describe the training rows, and that show the texts of two rows.

    With several sources, the two rows are from the first source.

    Args:
        rows: the tokenized training rows.
        encoder: its tokenizer decodes the token ids.
        name: the name of the rows.
        same_dropout_mask: whether a single text and its copy, the positive, have the same dropout mask.
        objective: the objective of these rows. If it learns vectors, a single text has no positive.
    """
    table = rows.tables[0] if isinstance(rows, Mixture) else rows
    shown = first_rows(table)
    lines = [heading(rows, table, encoder, name)]
    for number, row in enumerate(shown, 1):
        lines += row_lines(row, encoder, f"row {number}")
    if "target" not in objective.needs and any(len(row["input_ids"]) == 1 for row in shown):
        masks = "under one dropout mask" if same_dropout_mask else "under two dropout masks"
        masks = masks if any(dropout_rates(encoder.backbone).values()) else "with the same vector: the model has no dropout"
        lines.append(f"{'':5}  the positive is the same text, {masks}")
    return lines


def first_rows(table: Dataset | Stream) -> list[dict[str, Any]]:
    """Return the first rows, tokenized. Reading them from a streaming dataset does not remove them from the training."""
    if isinstance(table, Dataset):
        return table.__getitems__(list(range(min(SHOWN_ROWS, len(table)))))
    rows = [made for row in islice(table.rows, SHOWN_ROWS) for made in table.by_positive(row)]
    columns = table.tokenizer([row.texts for row in rows[:SHOWN_ROWS]])
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def heading(rows: Dataset | Mixture, table: Dataset | Stream, encoder: Encoder, name: str) -> str:
    """Return the first line: the number of rows, and how many texts are truncated. For a stream, only the truncated share."""
    if isinstance(rows, Mixture):
        more = len(rows.names) - SHOWN_SOURCES
        listed = ", ".join(rows.names[:SHOWN_SOURCES]) + (f" and {more} more" if more > 0 else "")
        name = f"{rows.names[0]}, the first of {len(rows.names)} sources ({listed})" if len(rows.names) > 1 else rows.names[0]
    if isinstance(table, Stream):
        cut = f"about {table.truncated_share:.0%} of the texts are truncated"
    else:
        texts, truncated = count_texts(table)
        length = f" to {encoder.max_length} tokens" if isinstance(rows, Dataset) else ""
        cut = f"{len(table):,} rows, {truncated:,} of {texts:,} texts truncated{length}"
    return f"as the model reads {name}: {cut}"


def row_lines(row: dict[str, Any], encoder: Encoder, label: str) -> list[str]:
    """Return one line for each text of a row: its role, its number of tokens, its beginning, and its score if it has one.

    Only the first of several negatives is shown. `label` stands before the first line.
    """
    texts = row["input_ids"]
    roles = ["text"] if len(texts) == 1 else ["anchor", "positive", "negative"]
    lines = []
    for role, ids in zip(roles, texts):
        text = shortened(str(encoder.tokenizer.decode(ids, skip_special_tokens=True)))
        lines.append(f"{role:8}  {len(ids):4} tokens  {text}")
    for place, score in enumerate(row.get("scores", [])[: len(lines) - 1], 1):
        lines[place] += f"  (score {score:.4g})"
    if len(texts) > len(roles):
        lines[-1] += f"  (and {len(texts) - len(roles)} more)"
    return [f"{'' if i else label:5}  {line}" for i, line in enumerate(lines)]
