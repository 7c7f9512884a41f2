"""The YAML file that lists sources, and how its entries are read.

Paths in the file are relative to the file:

    - name: questions
      file: questions.jsonl            # or a list of files, a pattern (questions-*.jsonl.gz), or a URL
      columns: {query: title, positive: body}   # default: recognized by the names in hf_embed.data.known_columns
      query_prompt: "query: "
    - name: nli
      dataset: sentence-transformers/all-nli    # a dataset on the Hub instead of a file
      config: triplet
      split: train
      negatives: 1                     # how many negatives of each row to use; default: all
      max_length: 128                  # default: the maximum length of the run
      ignore_columns: [label]          # a column that judges pairs is refused, unless it is ignored
      weight: 2.0                      # drawn twice as often as its size implies; default: 1
    - name: web
      file: web-*.jsonl.gz
      streaming: true                  # read the file where it is and store nothing; rows are shuffled in a buffer
      rows: 80000000                   # approximate; the length of a stream is unknown
    - name: clicks
      file: clicks.csv
      quoting: false                   # quotes are part of the texts, as in tsv files
    - name: graded
      file: graded.tsv                 # sentence1, sentence2, score
      objective: CoSENT                # default: the objective of the recipe; also {name: CoSENT, temperature: 0.1}
"""

import dataclasses
import difflib
import glob
import os
from collections import Counter
from pathlib import Path
from typing import Any, cast

from datasets import Dataset, IterableDataset

from hf_embed.data.columns import ROLES, take_columns
from hf_embed.data.mixture import Source, check_sources
from hf_embed.data.sources import leave_out, read_file, read_hub
from hf_embed.data.yaml_files import read_yaml
from hf_embed.errors import InputError, errors_of, masked
from hf_embed.objectives import OBJECTIVES, Objective
from hf_embed.progress import hidden_bars, table_bars

SETTINGS = ("query_prompt", "document_prompt", "max_length", "negatives", "weight")
# The values that the other keys accept: their YAML types, and a description in words.
TYPES = {
    "file": (str | list, "a path, a pattern, or a list of these"),
    "dataset": (str, "a name"),
    "config": (str | None, "a name"),
    "split": (str, "a name"),
    "columns": (dict, f"a mapping from {', '.join(ROLES)} to the file's columns"),
    "ignore_columns": (str | list, "a name, or a list of names"),
    "streaming": (bool, "true or false"),
    "quoting": (bool, "true or false"),
    "objective": (str | dict, "a name such as CoSENT, or a mapping such as {name: CoSENT, temperature: 0.1}"),
}
KEYS = {"name", "rows", *TYPES, *SETTINGS}


def read_sources(path: str) -> list[Source]:
    """Read the sources that a YAML file lists.

    Raises:
        InputError: if an entry is wrong. The message names the file, the source and the key.
    """
    entries = read_yaml(path, path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{path}: expected a list of sources, each '- name: ...' with file: or dataset:")
    with hidden_bars(), table_bars():  # none for each of many sources
        sources = [read_source(entry, i, path) for i, entry in enumerate(entries, 1)]
    check_sources(sources)
    return sources


def read_source(entry: dict, number: int, path: str) -> Source:
    """Read the source that the `number`-th entry of a YAML file describes.

    Raises:
        InputError: if the entry is wrong. The message names the file, the source and the key.
    """
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"{path}: source {number} has {f'the name {name!r}' if name else 'no name'}; give it a text as its name"
        )
    where = f"{path}, source '{name}'"
    check_entry(entry, where)
    with errors_of(where):
        rows, origin = read_entry(entry, Path(path).parent)
    settings = {key: entry[key] for key in SETTINGS if key in entry}
    objective = read_objective(entry["objective"], where) if "objective" in entry else None
    return Source(name, rows, **settings, objective=objective, size=entry.get("rows"), origin=origin)


def read_objective(given: str | dict, where: str) -> Objective:
    """Read the objective of a source: its name, or a mapping of `name` and its settings.

    Raises:
        InputError: if there is no objective of this name, or if a setting is unknown or wrong. The message begins with `where`.
    """
    settings = {"name": given} if isinstance(given, str) else dict(given)
    name = settings.pop("name", None)
    kinds = {known: kind for known, kind in OBJECTIVES.items() if known != "Matryoshka"}
    if name not in kinds:
        raise InputError(f"{where}: unknown objective {name!r}; use one of {', '.join(kinds)}")
    known = [field.name for field in dataclasses.fields(cast(Any, kinds[name]))]
    if unknown := [key for key in settings if key not in known]:
        raise InputError(f"{where}: {name} has no setting '{unknown[0]}'; it has {', '.join(known)}")
    try:
        return kinds[name](**settings)
    except (InputError, TypeError) as error:
        raise InputError(f"{where}: objective: {error}") from error


def check_entry(entry: dict, where: str) -> None:
    """Check the keys of an entry, and the types of their values."""
    for key in entry:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, 1)
            raise InputError(f"{where}: unknown key '{key}'" + (f" (did you mean '{close[0]}'?)" if close else ""))
    if ("file" in entry) == ("dataset" in entry):
        raise InputError(f"{where}: give either file: or dataset:")
    for key, needed in (("config", "dataset"), ("split", "dataset"), ("rows", "streaming")):
        if entry.get(key) is not None and not entry.get(needed):
            raise InputError(f"{where}: {key}: has no effect without {needed}:; remove it")
    for key, (kind, words) in TYPES.items():
        value = entry.get(key)
        only_texts = not isinstance(value, list) or all(isinstance(text, str) for text in value)
        if key in entry and (not isinstance(value, kind) or value in ("", []) or not only_texts):
            raise InputError(f"{where}: {key} is {value!r}; give {words}")


def read_entry(entry: dict, folder: Path) -> tuple[Dataset | IterableDataset, str]:
    """Return the rows of an entry, with only the columns that it uses, and a description of where the rows come from."""
    streaming, columns = entry.get("streaming", False), entry.get("columns")
    if "file" in entry:
        files = expand(entry["file"], folder)
        rows = read_file(files, streaming=streaming, quoting=entry.get("quoting", True))
        origin = masked(files[0]) if len(files) == 1 else f"{masked(files[0])} and {len(files) - 1} more"
    else:
        if "quoting" in entry:
            raise InputError("quoting applies only to csv files, not to a dataset; remove quoting:")
        origin = entry["dataset"]
        rows = read_hub(origin, entry.get("config"), entry.get("split", "train"), streaming)
    ignored = entry.get("ignore_columns", [])
    rows = leave_out(rows, [ignored] if isinstance(ignored, str) else ignored, "ignore_columns")
    return rows if columns is None else take_columns(rows, columns), origin


def expand(files: str | list[str], folder: Path) -> list[str]:
    """List the files that are given by path, pattern or URL. Paths are relative to `folder`.

    Raises:
        InputError: if no file matches a pattern, or if two entries name the same file.
    """
    found = []
    for file in [files] if isinstance(files, str) else files:
        full = file if "://" in file else str(folder / os.path.expanduser(file))
        is_pattern = glob.escape(full) != full and "://" not in full and not os.path.exists(full)  # a name may contain brackets
        matching = sorted(glob.glob(full)) if is_pattern else [full]
        if not matching:
            raise InputError(f"{full}: no file matches this pattern; check the path")
        found += matching
    if twice := [file for file, count in Counter(found).items() if count > 1]:
        raise InputError(f"{twice[0]}: this file is named twice under file:, so its rows would count twice; name it once")
    return found
