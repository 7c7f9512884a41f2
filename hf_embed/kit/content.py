"""Hashes of the data of a run, so that a finished run is not taken for one of other data with the same file names."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash
from datasets import Dataset

from hf_embed.data.columns import column_names, has_times
from hf_embed.data.mixture import Source
from hf_embed.files.safe_files import hash_of
from hf_embed.kit.plan import Plan
from hf_embed.kit.positives import parse_positive
from hf_embed.training.resume import hashed_rows, name_of, objective_facts


def content_of(plan: Plan) -> dict[str, str]:
    """Return hashes of the training rows and of the evaluation sets, by their names in messages.

    The seed makes no difference: the rows are those before positives are made from them. As in `hf_embed.training.resume`, a
    large table is hashed by a sample and without columns of dates, and a streaming dataset by its origin and settings only.
    """
    rows, positive = plan.rows if plan.given is None else plan.given, plan.positive
    given = [rows if isinstance(rows, Dataset) else [source_facts(source) for source in rows]]
    if positive and positive.synonyms and parse_positive(positive.positive)[0] == "synonym":
        given.append(hash_of(Path(positive.synonyms)))
    return {"training rows": content_hash(given), "evaluation set": content_hash(plan.tasks)}


def source_facts(source: Source) -> dict[str, Any]:
    """Return the rows of a source, or the origin and columns of a stream, with the settings that its batches depend on."""
    own = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    if isinstance(source.rows, Dataset):
        own.pop("origin")  # the name of a file, which may be moved
    else:
        own["rows"] = column_names(source.rows)
    return own | {"objective": None if source.own_objective is None else objective_facts(source.own_objective)}


def content_hash(value: Any) -> str:
    """Return a hash of tables, evaluation sets, lists, dicts and plain values."""
    digest = xxhash.xxh3_128()
    for part in parts(value):
        digest.update(part.encode(errors="surrogatepass"))
    return digest.hexdigest()


def parts(value: Any) -> Iterator[str]:
    """Yield the texts to hash of a value. They hold kinds and lengths too, so that different values never have equal texts."""
    if isinstance(value, Dataset):
        yield f"table {len(value)} "
        read = [column for column in value.column_names if not has_times(value, column)]
        for batch in hashed_rows(value).select_columns(read).iter(1_000):
            yield json.dumps(batch, default=str)
    elif isinstance(value, Mapping):
        yield f"dict {len(value)} "
        for pair in value.items():
            yield from parts(pair)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)} "
        for item in value:
            yield from parts(item)
    elif dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]  # the others change during an evaluation
        yield from parts([name_of(value), {name: getattr(value, name) for name in fields}])
    else:
        text = name_of(value) if callable(value) else repr(value)
        yield f"{len(text)} {text} "
