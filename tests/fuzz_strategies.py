"""Hypothesis strategies for hostile input: files, rows, YAML and model files.

A file is a pair (name, content). Most files are valid files that were damaged in one or two places, so that readers process a
large part before they reach the damage. Some files consist of hostile cells from the start.
"""

import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import math
import zipfile

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
from hypothesis import strategies as st

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
PLAIN = ["a cat", "a dog sleeps", "the sun is hot", "hello", "Schöne Grüße", "1", "0", "yes", "entailment", "contradiction"]
ODD = [
    "",
    " ",
    "\x00",
    "\x1c",
    "\x85",
    "\u2028",
    "\ufeff",
    "\r",
    "\n",
    "\t",
    '"',
    '"open',
    "'",
    '""',
    "\\",
    "nan",
    "NaN",
    "null",
    "None",
    "1e5",
    "1e999",
    "-1",
    "0.5",
    "9" * 400,
    "['a', 'b']",
    '["a", "b"]',
    "[]",
    "{}",
    '{"a": 1}',
    "2020-01-01",
    "=1+1",
    "🙂",
    "\u200b",
    "e\u0301",
    "\ud800",
    "a,b",
    "a;b",
    "a\tb",
    "label",
    "score",
    "_id",
    "true",
    "#",
    "---",
    "%",
    "\x7f",
    "\ue000",
    "\ufdd0",
    "\ufffe",
    "x" * 5000,
    "-",
    "*",
    "&a",
    "!!python/object:os.system",
    "../..",
    "http://[",
    "\ud83d",
]
plain = st.sampled_from(PLAIN)
texts = st.one_of(plain, plain, plain, st.sampled_from(ODD), st.text(max_size=8))
NAMES = [
    "text",
    "sentence",
    "anchor",
    "positive",
    "negative",
    "negative_1",
    "negative_2",
    "negatives",
    "query",
    "pos",
    "neg",
    "question",
    "answer",
    "answers",
    "title",
    "body",
    "sentence1",
    "sentence2",
    "score",
    "label",
    "labels",
    "gold_label",
    "premise",
    "hypothesis",
    "sent0",
    "sent1",
    "hard_neg",
    "documents",
    "document",
    "code",
    "docstring",
    "_id",
    "Text",
    "sentence_1",
    "is_duplicate",
    "question1",
    "question2",
    "entailment",
    "id",
]
LAYOUTS = [["text"], ["sentence1", "sentence2", "score"], ["sentence1", "sentence2", "label"], ["anchor", "positive"],
           ["anchor", "positive", "negative"], ["query", "positive", "negatives"], ["query", "document", "label"],
           ["premise", "hypothesis", "label"], ["label", "text"], ["docstring", "code"], ["question", "answer"],
           ["query", "pos", "neg"], ["query", "positive", "documents"], ["score", "a", "b"], ["0", "1"]]  # fmt: skip
any_columns = st.one_of(
    st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS), st.lists(st.one_of(st.sampled_from(NAMES), texts), max_size=5)
)


@st.composite
def columns_of(draw, layouts: list[list[str]] | None = None) -> list[str]:
    """Choose columns. In most cases a reader of these layouts accepts them."""
    if layouts is None or seldom(draw, 10):
        return draw(any_columns)
    return [
        *draw(st.sampled_from(layouts)),
        *([] if not seldom(draw, 5) else draw(st.lists(st.sampled_from(NAMES), max_size=2))),
    ]


numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 10**9, 2**63, -(2**63) - 1, 10**400, 0.0, 0.5, 1.0, 1e308, math.nan, math.inf, -math.inf]),
    st.integers(-3, 6),
    st.floats(),
)
scalars = st.one_of(texts, texts, numbers, st.none(), st.booleans())
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=5
)


def to_bytes(text: str) -> bytes:
    """Encode a text as UTF-8, including lone surrogates."""
    return text.encode("utf-8", "surrogatepass")


def seldom(draw, times: int) -> bool:
    """Return True about once in `times` calls. The value is in the middle, because Hypothesis prefers the ends of a range."""
    return draw(st.integers(0, times)) == times // 2


# ---- damage ----


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Damage the bytes of a file in one or two places, or return them unchanged."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 0, 0, 1, 1, 2]))):
        place = draw(st.integers(0, max(0, len(content))))
        content = draw(
            st.sampled_from([
                content[:place],
                content[:place] + to_bytes(draw(texts)) + content[place:],
                content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
                if place < len(content) else content,
                content[:place] + content[place + draw(st.integers(1, 40)) :],
                content + content,
                content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b""]))),
                b"\xef\xbb\xbf" + content,
                content.decode("utf-8", "replace").encode("utf-16"),
                content.decode("utf-8", "replace").encode("cp1252", "replace"),
                b"", b"\n", LFS, b"PK\x03\x04" + content, b"\x93NUMPY" + content,
            ])
        )  # fmt: skip
    return content


def packed(content: bytes) -> bytes:
    """Compress bytes with gzip."""
    return gzip.compress(content, 1)


def zipped(content: bytes) -> bytes:
    """Return a zip archive whose only file holds the bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.csv", content)
    return out.getvalue()


# ---- tables in files ----


WORDS = {
    "label": ["0", "1"], "is_duplicate": ["0", "1", "true", "False"], "score": ["0", "1.5", "5"], "_id": ["1", "2"],
    "gold_label": ["entailment", "neutral", "contradiction", "-"],
}  # fmt: skip


@st.composite
def rows_of(draw, names: list[str], other: st.SearchStrategy) -> list[dict]:
    """Make rows. Most cells hold what their column usually holds; some columns and some single cells hold `other` values."""
    odd_column = draw(st.sampled_from([None, None, *names])) if names else None
    rows = []
    for number in range(draw(st.sampled_from([4, 4, 3, 2, 1, 0]))):
        row = {}
        for name in names:
            usual = WORDS.get(name)
            if name == odd_column or seldom(draw, 30):
                row[name] = draw(other)
            else:
                row[name] = usual[(number + draw(st.integers(0, 1))) % len(usual)] if usual else draw(plain)
        rows.append(row)
    return rows


@st.composite
def delimited(draw, kind: str, layouts: list[list[str]] | None = None) -> bytes:
    """Make a csv or tsv file."""
    names = draw(columns_of(layouts))
    rows = [list(row.values()) for row in draw(rows_of(list(dict.fromkeys(names)), texts))]
    if seldom(draw, 10):
        rows.append(draw(st.lists(texts, max_size=len(names) + 1)))
    rows = [[*names], *rows] if not seldom(draw, 10) else rows
    if kind == "tsv" or seldom(draw, 4):
        return to_bytes("".join(("\t" if kind == "tsv" else ",").join(row) + "\n" for row in rows))
    out = io.StringIO()
    csv.writer(out, lineterminator=draw(st.sampled_from(["\n", "\r\n"]))).writerows(rows)
    return to_bytes(out.getvalue())


DEEP = [
    "[" * 50_000,
    '{"a":' * 3000,
    '{"text": ' + "9" * 5000 + "}",
    '{"text": NaN}',
]


@st.composite
def json_lines(draw, layouts: list[list[str]] | None = None) -> bytes:
    """Make a jsonl file or a json file."""
    names = draw(columns_of(layouts))
    rows: list = draw(
        rows_of(names, draw(st.sampled_from([texts, st.lists(texts, max_size=3), st.lists(plain, min_size=1), values])))
    )
    if seldom(draw, 10):
        rows.append(draw(values))
    lines = [json.dumps(row, ensure_ascii=draw(st.booleans())) for row in rows]
    if seldom(draw, 30):
        lines.append(draw(st.sampled_from(DEEP)))
    if seldom(draw, 4):
        return to_bytes("[" + ",\n".join(lines) + "]")
    return to_bytes("\n".join(lines) + draw(st.sampled_from(["\n", ""])))


ARROW = [
    pyarrow.array([1, 2, None]),
    pyarrow.array([0.5, math.nan, 1.0]),
    pyarrow.array([b"\xff", b"a", None]),
    pyarrow.array([datetime.date(2020, 1, 1)] * 3),
    pyarrow.array([["a", "b"], [], None]),
    pyarrow.array([[1], [2], [3]]),
    pyarrow.array([{"a": 1}, {"a": 2}, None]),
    pyarrow.array([None, None, None]),
    pyarrow.array([True, False, None]),
    pyarrow.array(["a cat", "a dog", "a cow"]),
    pyarrow.array(["a cat", None, ""]),
    pyarrow.array(["x", "y", "z"]).dictionary_encode(),
    pyarrow.array([decimal.Decimal("1.5")] * 3),
    pyarrow.array(["a cat", "b", "c"], pyarrow.large_string()),
    pyarrow.array([["a"], ["b"], ["c"]], pyarrow.large_list(pyarrow.string())),
    pyarrow.array([datetime.timedelta(1)] * 3),
    pyarrow.array([datetime.datetime(2020, 1, 1)] * 3),
    pyarrow.array(["entailment", "neutral", "contradiction"]),
    pyarrow.array([[("a", 1)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    pyarrow.array([0, 1, 0]),
    pyarrow.array([[["a"]], [[]], None]),
    pyarrow.array(["a", "b", "c"], pyarrow.string_view()),
]


@st.composite
def arrow_tables(draw, layouts: list[list[str]] | None = None) -> pyarrow.Table:
    """Make an Arrow table."""
    good = {"label": pyarrow.array([0, 1, 0]), "score": pyarrow.array([0.5, 1.0, 2.0])}
    names = draw(columns_of(layouts))
    count = draw(st.sampled_from([3, 3, 3, 3, 2, 1, 0]))
    cells = [draw(st.sampled_from([*ARROW, *ARROW[9:10] * 40, ARROW[18]])).slice(0, count) for _ in names]
    if not seldom(draw, 4):
        cells = [good[name].slice(0, count) if name in good else cell for name, cell in zip(names, cells)]
    return pyarrow.Table.from_arrays(cells, names=[to_bytes(name).decode("utf-8", "replace") for name in names])


@st.composite
def parquet(draw, layouts: list[list[str]] | None = None) -> bytes:
    """Make a parquet file."""
    out = io.BytesIO()
    pyarrow.parquet.write_table(draw(arrow_tables(layouts)), out)
    return out.getvalue()


@st.composite
def table_files(
    draw, kinds=("csv", "tsv", "jsonl", "json", "txt"), layouts: list[list[str]] | None = None
) -> tuple[str, bytes]:
    """Make a file of rows: its name and its content."""
    kind = draw(st.sampled_from(kinds))
    if kind in ("csv", "tsv"):
        content = draw(delimited(kind, layouts))
    elif kind == "parquet":
        content = draw(parquet(layouts))
    elif kind == "txt":
        content = to_bytes(
            "".join(text + draw(st.sampled_from(["\n", "\r\n", "\r"])) for text in draw(st.lists(texts, max_size=5)))
        )
    else:
        content = draw(json_lines(layouts))
    content = draw(damaged(content))
    if seldom(draw, 20):
        return f"data.{kind}.gz", draw(damaged(packed(content)))
    if seldom(draw, 50):
        return f"data.{kind}.gz", content
    if seldom(draw, 50):
        return f"data.{kind}", draw(st.sampled_from([packed(content), zipped(content)]))
    return f"data.{kind}", content


# ---- BEIR folders ----


@st.composite
def beir_folders(draw) -> dict[str, bytes]:
    """Make the files of a BEIR folder."""
    ids = st.sampled_from(["1", "2", "3", "4", "5", "6", 1, 2, "", None, 1.5, "\ud800", "1 ", True])
    files = {}
    for name in ("corpus", "queries"):
        rows: list = draw(rows_of(["_id", "text", "title"], st.one_of(texts, values, ids)))
        for number, row in enumerate(rows):
            if isinstance(row["_id"], str) and not seldom(draw, 10):
                row["_id"] = str(number + 1)
        rows += draw(st.lists(values, max_size=1)) if seldom(draw, 10) else []
        content = "".join(json.dumps(one, ensure_ascii=draw(st.booleans())) + "\n" for one in rows)
        files[f"{name}.jsonl"] = draw(damaged(to_bytes(content)))
    grades = st.sampled_from(
        ["1", "1", "1", "2", "0", "-1", "1.0", "1.5", "1e300", "1e999", "nan", "x", "", "9" * 400, "٣", "1_0", " 1", "9" * 5000]
    )
    known = st.sampled_from(["1", "2", "1", "2", "", "9"])
    judged = draw(st.lists(st.tuples(known, known, grades), max_size=4, unique_by=lambda one: one[:2]))
    header = draw(st.sampled_from(["query-id\tcorpus-id\tscore\n"] * 4 + ["", "a\tb\tc\n", "query-id\tscore\tcorpus-id\tx\n"]))
    content = header + "".join("\t".join(one) + "\n" for one in judged)
    files["qrels/test.tsv"] = draw(damaged(to_bytes(content)))
    if seldom(draw, 30):
        del files[draw(st.sampled_from(sorted(files)))]
    return files


# ---- YAML ----

YAML = [
    "!!python/object/apply:os.system [id]",
    "a: b: c",
    "\t- x",
    "? [1, 2]\n: x",
    "? {a: b}\n: x",
    "!!timestamp x",
    "2020-13-45",
    "2020-99-99: 1",
    "!!binary x",
    "!!int abc",
    "!!float abc",
    "{",
    "<<: *x",
    "<<: [1]",
    "<<: 5",
    "a: *missing",
    "%YAML 9.9\n---\n",
    "--- a\n--- b\n",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!!pairs [a: 1]",
    "!x y",
    "0o9",
    "1__2",
    "190:20:30",
    ".inf",
    ".nan",
    "~",
    "=",
    "!!str",
    "!!null x",
    "!!bool maybe",
    "a: !!python/name:os.system",
    "\u0000",
    "a: |\n x",
    "? \n: \n",
    "'",
    '"\\x"',
    '"\\ud800"',
    "? !!python/tuple [1]\n: 2",
    "!!map [1]",
    "!!seq {a: 1}",
    "0b",
    "0x",
    "+",
    "-0b",
    "1:99:",
    ":",
    "*",
    "&",
]


def as_yaml(value: object) -> str:
    """Write a value as JSON, which is valid YAML in flow style. Values that JSON does not support become strings."""
    return json.dumps(value, default=str, ensure_ascii=False)


@st.composite
def yaml_texts(draw, keys: list[str], base: str) -> bytes:
    """Make a YAML file with some of `keys`, or damage `base`."""
    choice = draw(st.sampled_from([3, 2, 1, 0, 3]))
    if choice == 0:
        return to_bytes(draw(st.sampled_from(YAML)))
    if choice == 1:
        return draw(damaged(to_bytes(base)))
    key = st.one_of(st.sampled_from(keys), st.sampled_from(keys), texts, st.sampled_from(YAML))
    value = st.one_of(values.map(as_yaml), values.map(as_yaml), st.sampled_from(YAML))
    lines = [f"{one}: {two}" for one, two in draw(st.lists(st.tuples(key, value), max_size=4))]
    if choice == 2:
        return to_bytes("\n".join(lines))
    entry = "\n".join(["- name: a", *(f"  {line}" for line in lines)])
    return to_bytes(
        draw(st.sampled_from([entry, base + entry, base.rstrip() + "\n" + "\n".join(f"  {line}" for line in lines)]))
    )


# ---- rows that a script passes in ----

objects = st.one_of(
    values,
    values,
    st.binary(max_size=3),
    st.just(datetime.date(2020, 1, 1)),
    st.just(decimal.Decimal(1)),
    st.just(object()),
    st.just({1, 2}),
    st.just(np.float32("nan")),
    st.just(np.array(["a", "b"])),
    st.just(pandas.NA),
    st.just(pandas.NaT),
    st.just(1j),
    st.just(np.int64(3)),
    st.just(np.str_("a")),
    st.just(np.array(5)),
    st.just(datetime.timedelta(1)),
    st.just(range(3)),
    st.just(("a",)),
    st.just(np.datetime64("NaT")),
    st.just(str),
    st.just(print),
    st.just(float("nan")),
    st.just(np.array([[1.0]])),
)
arrays = st.builds(
    lambda shape, kind, fill: np.full(shape, fill).astype(kind),
    st.sampled_from([(), (0,), (2,), (0, 2), (2, 2), (3, 2), (2, 0), (1, 2, 2), (2, 8), (2, 3)]),
    st.sampled_from(
        ["float32", "float64", "float16", "int8", "uint8", "int64", "bool", "complex64", "object", "U1", "datetime64[s]"]
    ),
    st.sampled_from([0, 1]),
)
cells = st.one_of(texts, texts, texts, st.lists(texts, max_size=3), objects)


@st.composite
def frames(draw) -> pandas.DataFrame:
    """Make a DataFrame."""
    names = draw(any_columns)
    count = draw(st.integers(0, 3))
    frame = pandas.DataFrame(
        {i: draw(st.lists(cells, min_size=count, max_size=count)) for i in range(len(names))}, dtype=object
    )
    frame.columns = [draw(st.one_of(st.just(name), st.just(name), st.just(name), objects.filter(hashable))) for name in names]
    change = draw(st.integers(0, 9))
    if change == 0:
        with contextlib.suppress(UnicodeEncodeError):  # raised for a lone surrogate
            frame = frame.convert_dtypes()
    if change == 1 and len(names):
        frame = frame.astype("category", errors="ignore")
    if change == 2 and len(frame) and len(names):
        frame.index = list("abc")[: len(frame)]
    if change == 3:
        frame.columns = (
            pandas.MultiIndex.from_tuples([("a", str(i)) for i in range(len(names))]) if len(names) else frame.columns
        )
    return frame


def hashable(value: object) -> bool:
    """Return True if a value can be a dictionary key."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


@st.composite
def python_rows(draw):
    """Make a value that a script may pass as rows."""
    choice = draw(st.integers(0, 5))
    if choice == 0:
        return draw(frames())
    if choice == 1:
        return draw(objects)
    if choice == 2:
        return draw(st.lists(cells, max_size=4))
    if choice == 3:
        return draw(st.lists(st.tuples(cells, cells), max_size=3)) + draw(
            st.lists(st.lists(cells, max_size=4).map(tuple), max_size=1)
        )
    names = draw(columns_of(LAYOUTS))
    row = st.fixed_dictionaries(dict.fromkeys(names, cells))
    rows = draw(st.lists(row, max_size=4)) + draw(
        st.lists(st.dictionaries(objects.filter(hashable), cells, max_size=2), max_size=1)
    )
    return rows if choice == 4 else [dict(row) for row in rows]


# ---- models ----


@st.composite
def json_objects(draw, base: object, keys: list[str]) -> bytes:
    """Make a JSON file: `base` with one or two keys changed or deleted, `base` with damaged bytes, or unrelated JSON."""
    if seldom(draw, 5):
        return draw(damaged(json.dumps(base).encode()))
    if seldom(draw, 10):
        return to_bytes(draw(st.one_of(st.sampled_from(DEEP), values.map(json.dumps))))
    content = json.loads(json.dumps(base))
    parts = [content] if isinstance(content, dict) else [part for part in content if isinstance(part, dict)]
    for _ in range(draw(st.integers(1, 2))):
        part = draw(st.sampled_from(parts))
        key = draw(st.one_of(st.sampled_from(keys), st.sampled_from(sorted(part) or keys), texts))
        if not seldom(draw, 6) or key not in part:
            part[key] = draw(st.one_of(values, numbers))
        else:
            del part[key]
    return json.dumps(content).encode()


@st.composite
def damaged_tensors(draw, content: bytes) -> bytes:
    """Damage a .safetensors file: its header length, its header, its end, or its whole content."""
    header = int.from_bytes(content[:8], "little")
    choice = draw(st.integers(0, 6))
    if choice == 0:
        return (
            draw(st.sampled_from([0, 1, header - 1, header + 1, 2**31, 2**60, 2**64 - 1])).to_bytes(8, "little") + content[8:]
        )
    if choice == 1:
        return content[: draw(st.integers(0, len(content) - 1))]
    if choice == 2:
        place = draw(st.integers(8, 8 + header - 1))
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    if choice == 3:
        names = json.loads(content[8 : 8 + header])
        entry = names[draw(st.sampled_from(sorted(set(names) - {"__metadata__"})))]
        entry[draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = draw(
            st.one_of(
                st.sampled_from(["I8", "F64", "U8", "F8_E4M3", "BOOL", [1], [0], [], [2**62, 4], [0, 10**12], [5, 1], [-1]]),
                values,
            )
        )
        new = json.dumps(names).encode()
        return len(new).to_bytes(8, "little") + new + content[8 + header :]
    if choice == 4:
        return draw(
            st.sampled_from([LFS, b"", b"\x00" * 100, b"PK\x03\x04", (2).to_bytes(8, "little") + b"{}", b"<!DOCTYPE html>"])
        )
    if choice == 5:
        return content + draw(st.binary(min_size=1, max_size=9))
    return draw(damaged(content))
