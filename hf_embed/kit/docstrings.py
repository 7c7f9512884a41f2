"""Training and test pairs that are available on every machine: the docstrings of the installed Python packages.

    def norm(x, ord=None):
        '''Matrix or vector norm.

        This function is able to return one of eight different matrix norms ...
        '''
        x = asarray(x)
        ...

gives three pairs: the summary and the body of the docstring, the qualified name and the summary, and the summary and the code
without the docstring. Files are parsed, never imported.
"""

import ast
import importlib.util
import inspect
import json
import os
import random
import re
import shutil
import sysconfig
import textwrap
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml
from accelerate import PartialState
from torch import Tensor

from hf_embed.data.source_files import read_sources
from hf_embed.errors import InputError
from hf_embed.files.read_files import read_text
from hf_embed.files.safe_files import write_text
from hf_embed.mining import MiningArguments, write_hard_negatives
from hf_embed.progress import progress_bar

# "python" is the standard library. The other packages are installed together with hf_embed.
PACKAGES = ("python", "numpy", "scipy", "pandas", "torch", "transformers", "sympy", "networkx", "matplotlib", "datasets",
            "huggingface_hub", "accelerate", "peft")  # fmt: skip
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "tests", "test", "testing", "_vendor", "vendored"}
MAX_FILES = 150  # of each package, chosen at random, because parsing all of torch and transformers takes a minute
# Most and fewest characters of a text (a token has about four). A longer body or code is cut, and a longer summary is left out.
# Shorter texts hold too little information.
LONGEST = {"summary": 300, "body": 500, "code": 500}
SHORTEST = {"summary": 20, "body": 60, "code": 80, "page": 500}
Pair = tuple[str, str]  # query, document
# kind of pair -> the fields that are the query and the document
KINDS = {"body": ("summary", "body"), "name": ("name", "summary"), "code": ("summary", "code")}


Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Definition:
    """A function or class with a docstring. `body` or `code` is empty if the text is too short."""

    name: str  # numpy.linalg.norm
    module: str  # numpy.linalg._linalg
    summary: str  # the docstring's first paragraph, in one line
    body: str  # the rest of the docstring
    code: str  # the source without the docstring


def read_definitions(package: str, max_files: int | None = None) -> list[Definition]:
    """Read the definitions of a package or of a folder of Python files. Each summary occurs once.

    Args:
        package: the name of a package, "python" for the standard library, or the path of a folder.
        max_files: the largest number of files to read, chosen at random. Default: all.

    Raises:
        InputError: if there is no such package or folder.
    """
    root = package_folder(package)
    files = sorted(
        path for path in root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts) and path.stat().st_size < 1_000_000
    )  # fmt: skip
    if max_files is not None and len(files) > max_files:
        files = sorted(random.Random(0).sample(files, max_files))
    prefix = "" if package == "python" else f"{root.name}."
    by_summary: dict[str, Definition] = {}
    for path in progress_bar(files, desc=package, unit="file"):
        module = prefix + ".".join(path.relative_to(root).with_suffix("").parts)
        for definition in parse_file(path, module.removesuffix(".__init__")):
            by_summary.setdefault(definition.summary, definition)
    return list(by_summary.values())


def read_packages() -> Iterator[tuple[str, list[Definition]]]:
    """Yield each of `PACKAGES` that is installed, with its definitions."""
    for package in progress_bar(PACKAGES, desc="Reading docstrings", unit="package"):
        try:
            found = read_definitions(package, MAX_FILES)
        except InputError:  # the package is not installed
            continue
        yield package, found


def package_folder(package: str) -> Path:
    """Find the folder of a package without importing the package. Raises InputError if there is no such folder."""
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    if os.path.isdir(package):
        return Path(package).resolve()
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{package}: there is no such file, folder or installed package")
    return Path(list(spec.submodule_search_locations)[0])


def parse_file(path: Path, module: str) -> Iterator[Definition]:
    """Yield the definitions in a file. A file that this version of Python cannot parse has none."""
    try:
        source = read_text(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escape sequences in the code of other packages
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # an InputError of read_text is a ValueError
        return  # a template, or a file for another version of Python
    lines = re.split(r"\r\n|\r|\n", source)  # as Python counts lines; `splitlines` also breaks at a form feed

    def definitions(node: ast.AST, name: str) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Documented):
                qualified = f"{name}.{child.name}"
                if (docstring := ast.get_docstring(child, clean=False)) and not child.name.startswith("__"):
                    yield from describe(child, qualified, module, inspect.cleandoc(docstring), lines)
                yield from definitions(child, qualified)
            elif not isinstance(child, ast.expr):
                yield from definitions(child, name)  # definitions inside if and try

    yield from definitions(tree, module)


def describe(node: Documented, name: str, module: str, docstring: str, lines: list[str]) -> Iterator[Definition]:
    """Yield the definition at `node` if its summary has a suitable length and more than one word."""
    summary, _, body = docstring.partition("\n\n")
    summary = " ".join(summary.split())
    if not SHORTEST["summary"] <= len(summary) <= LONGEST["summary"] or " " not in summary:
        return
    written = node.body[0]  # the statement that is the docstring
    kept = lines[node.lineno - 1 : written.lineno - 1] + lines[written.end_lineno : node.end_lineno]
    code = textwrap.dedent("\n".join(kept)).strip() if len(node.body) > 1 else ""
    body = body.strip()
    yield Definition(
        name, module, summary,
        body=body[: LONGEST["body"]] if len(body) >= SHORTEST["body"] else "",
        code=code[: LONGEST["code"]] if len(code) >= SHORTEST["code"] and not isinstance(node, ast.ClassDef) else "",
    )  # fmt: skip


def read_pages() -> list[str]:
    """Read long texts that are available on every machine.

    Each text joins the docstrings of one module of the installed packages. Short texts are left out.
    """
    pages: dict[str, list[str]] = {}
    for _, found in read_packages():
        for definition in found:
            pages.setdefault(definition.module, []).append(f"{definition.summary} {definition.body}")
    texts = [text for parts in pages.values() if len(text := " ".join(" ".join(parts).split())) >= SHORTEST["page"]]
    random.Random(0).shuffle(texts)  # mixes the packages, so that the first texts come from all of them
    return texts


def held_out(definition: Definition) -> bool:
    """Return True if a definition is for testing.

    One module in eight is held out. The choice depends on the name of the module only, so it is the same in every run.
    """
    return zlib.crc32(definition.module.encode()) % 8 == 0


def write_sources(folder: str | Path) -> dict[str, int]:
    """Write the training and evaluation data for a run on docstrings into `folder`.

    The files have the same formats as a user's own data:

        PACKAGE.KIND.jsonl ...   a source for each package and kind of pair: {"query": ..., "positive": ...}
        sources.yaml             the list of these sources
        doc_search/  code_search/   BEIR folders of the held-out modules: summary -> body, summary -> code

    Packages that are not installed are left out. Returns counts for printing: {"packages": 13, ...}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, tests, trained = collect_pairs()
    entries = []
    for name, rows in pairs.items():
        if len(rows) < 2:
            continue
        lines = (json.dumps({"query": query, "positive": positive}) for query, positive in rows)
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        entries.append({"name": name, "file": f"{name}.jsonl"})
    write_text(folder / "sources.yaml", yaml.safe_dump(entries, sort_keys=False))
    for name, kind in {"doc_search": "body", "code_search": "code"}.items():
        # A pair with a text of the training data is left out, because it would not test generalization.
        fresh = [pair for pair in tests[kind] if not trained.intersection(pair)]
        write_beir(folder / name, list(dict(fresh).items()))
    return {
        "packages": len({name.rsplit(".", 1)[0] for name in pairs}), "sources": len(entries),
        "pairs": sum(map(len, pairs.values())), "test pairs": sum(map(len, tests.values())),
    }  # fmt: skip


def collect_pairs() -> tuple[dict[str, list[Pair]], dict[str, list[Pair]], set[str]]:
    """Collect pairs from the installed packages.

    Returns:
        The training pairs by PACKAGE.KIND, the test pairs (of held-out modules) by kind, and all texts of the training modules.
    """
    pairs: dict[str, list[Pair]] = {}
    tests: dict[str, list[Pair]] = {"body": [], "code": []}
    trained: set[str] = set()
    for package, found in read_packages():
        for definition in found:
            if not held_out(definition):
                trained.update((definition.summary, definition.body, definition.code))
                for kind in KINDS:
                    if pair := pair_of(definition, kind):
                        pairs.setdefault(f"{package}.{kind}", []).append(pair)
        for kind in tests:
            tests[kind] += [pair for d in found if held_out(d) and (pair := pair_of(d, kind))]
    return pairs, tests, trained


def mine_negatives(folder: Path, embed: Callable[..., Tensor]) -> Path:
    """Mine a hard negative for each pair of the sources in `folder`. Every rank calls this.

    Returns:
        The path of sources.yaml for the mined sources.
    """
    mined, state = folder / "mined", PartialState()
    if state.is_main_process:
        shutil.rmtree(mined, ignore_errors=True)
    state.wait_for_everyone()
    entries = []
    for source in read_sources(str(folder / "sources.yaml")):
        file = f"{source.name}.jsonl"
        if source.name.endswith(".name"):  # names are too short to have hard negatives
            file = f"../{file}"
        else:
            pairs = list(zip(source.rows["query"][:], source.rows["positive"][:]))
            write_hard_negatives(pairs, [], embed, mined / file, MiningArguments(num_negatives=1))
        entries.append({"name": source.name, "file": file})
    if state.is_main_process:
        write_text(mined / "sources.yaml", yaml.safe_dump(entries, sort_keys=False))
    state.wait_for_everyone()
    return mined / "sources.yaml"


def pair_of(definition: Definition, kind: str) -> Pair | None:
    """Return the (query, document) pair of one kind for a definition, or None if one of its two texts is missing."""
    query, document = (getattr(definition, part) for part in KINDS[kind])
    return (query, document) if query and document else None


def write_beir(folder: Path, pairs: list[Pair]) -> None:
    """Write a BEIR folder of (query, document) pairs. Each query has one relevant document, that of its pair."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, prefix, texts in (("queries", "q", [q for q, _ in pairs]), ("corpus", "d", [d for _, d in pairs])):
        lines = (json.dumps({"_id": f"{prefix}{i}", "text": text}) for i, text in enumerate(texts))
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    qrels = [f"q{i}\td{i}\t1" for i in range(len(pairs))]
    write_text(folder / "qrels" / "test.tsv", "\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n")
