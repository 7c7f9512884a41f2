"""Pairs to train and test on that every machine has: the docstrings of the Python packages installed on it.

    def norm(x, ord=None):
        '''Matrix or vector norm.

        This function is able to return one of eight different matrix norms ...
        '''
        x = asarray(x)
        ...

gives three pairs: the summary and the body of the docstring; the qualified name and the summary; the summary and the code
without its docstring. Files are parsed, never imported.
"""

import ast
import importlib.util
import inspect
import json
import random
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

from hf_embed.data.mixture import read_sources
from hf_embed.errors import InputError
from hf_embed.mining import MiningArguments, write_hard_negatives
from hf_embed.progress import progress_bar
from hf_embed.safe_files import write_text

# "python" is the standard library. What hf_embed needs brings the others along.
PACKAGES = ("python", "numpy", "scipy", "pandas", "torch", "transformers", "sympy", "networkx", "matplotlib", "datasets",
            "huggingface_hub", "accelerate", "peft")  # fmt: skip
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "tests", "test", "testing", "_vendor", "vendored"}
MAX_FILES = 150  # of a package, chosen at random: parsing all of torch and transformers takes a minute
# Texts are cut to this many characters (a token is about four), and shorter ones than the least say too little.
LONGEST = {"summary": 300, "body": 500, "code": 500}
SHORTEST = {"summary": 20, "body": 60, "code": 80}
Pair = tuple[str, str]  # query, document
# kind of pair -> query and document
KINDS = {"body": ("summary", "body"), "name": ("name", "summary"), "code": ("summary", "code")}


Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Definition:
    """A function or class with a docstring; `body` and `code` are empty where there is not enough of them."""

    name: str  # numpy.linalg.norm
    module: str  # numpy.linalg._linalg
    summary: str  # the docstring's first paragraph, in one line
    body: str  # the rest of the docstring
    code: str  # the source without the docstring


def read_definitions(package: str, max_files: int | None = None) -> list[Definition]:
    """Read the definitions of a package or a folder of Python files; each summary once.

    A package is given by its name; "python" is the standard library.

    Raises:
        InputError: there is no such package or folder.
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


def package_folder(package: str) -> Path:
    """Find the folder of a package's files, without importing it. Raises InputError if there is none."""
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    if Path(package).is_dir():
        return Path(package).resolve()
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{package}: no such file, folder or installed package")
    return Path(list(spec.submodule_search_locations)[0])


def parse_file(path: Path, module: str) -> Iterator[Definition]:
    """Yield the definitions in a file; a file that is no Python of this version has none."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strange escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, OSError):
        return  # templates and files for other Pythons
    lines = source.splitlines()

    def definitions(node: ast.AST, name: str) -> Iterator[Definition]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Documented):
                qualified = f"{name}.{child.name}"
                if (docstring := ast.get_docstring(child, clean=False)) and not child.name.startswith("__"):
                    yield from describe(child, qualified, module, inspect.cleandoc(docstring), lines)
                yield from definitions(child, qualified)
            elif not isinstance(child, ast.expr):
                yield from definitions(child, name)  # within if and try

    yield from definitions(tree, module)


def describe(node: Documented, name: str, module: str, docstring: str, lines: list[str]) -> Iterator[Definition]:
    """Yield the definition at `node`, if its summary is neither too short nor too long."""
    summary, _, body = docstring.partition("\n\n")
    summary = " ".join(summary.split())
    if not SHORTEST["summary"] <= len(summary) <= LONGEST["summary"] or " " not in summary:
        return
    written = node.body[0]  # the docstring's statement
    kept = lines[node.lineno - 1 : written.lineno - 1] + lines[written.end_lineno : node.end_lineno]
    code = textwrap.dedent("\n".join(kept)).strip() if len(node.body) > 1 else ""
    body = body.strip()
    yield Definition(
        name, module, summary,
        body=body[: LONGEST["body"]] if len(body) >= SHORTEST["body"] else "",
        code=code[: LONGEST["code"]] if len(code) >= SHORTEST["code"] and not isinstance(node, ast.ClassDef) else "",
    )  # fmt: skip


def read_pages(packages: tuple[str, ...] = PACKAGES, max_files: int = MAX_FILES, least: int = 500) -> list[str]:
    """Read long texts that every machine has.

    A text is that of all docstrings of a module of the installed packages, one after the other, where it has at least `least`
    characters.
    """
    pages: dict[str, list[str]] = {}
    for package in progress_bar(packages, desc="Reading docstrings", unit="package"):
        try:
            definitions = read_definitions(package, max_files)
        except InputError:
            continue
        for definition in definitions:
            pages.setdefault(definition.module, []).append(f"{definition.summary} {definition.body}")
    texts = [text for parts in pages.values() if len(text := " ".join(" ".join(parts).split())) >= least]
    random.Random(0).shuffle(texts)  # packages mixed: whoever takes the first takes of all
    return texts


def held_out(definition: Definition) -> bool:
    """Tell whether a definition is for testing: one module in eight is, by its name, so that every run agrees."""
    return zlib.crc32(definition.module.encode()) % 8 == 0


def write_sources(folder: str | Path, packages: tuple[str, ...] = PACKAGES, max_files: int = MAX_FILES) -> dict[str, int]:
    """Write what a run on docstrings needs into `folder`.

    The formats are those of any other data:

        PACKAGE.KIND.jsonl ...   a source for each package and kind of pair: {"query": ..., "positive": ...}
        sources.yaml             which lists them
        doc_search/  code_search/   BEIR folders of the held-out modules: summary -> body, summary -> code

    Packages that are not installed are left out. Returns what was collected, for printing: {"packages": 13, ...}.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pairs, tests, trained = collect_pairs(packages, max_files)
    entries = []
    for name, rows in pairs.items():
        if len(rows) < 2:
            continue
        lines = (json.dumps({"query": query, "positive": positive}) for query, positive in rows)
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
        entries.append({"name": name, "file": f"{name}.jsonl"})
    write_text(folder / "sources.yaml", yaml.safe_dump(entries, sort_keys=False))
    for name, kind in {"doc_search": "body", "code_search": "code"}.items():
        # Texts that are copied from module to module test nothing.
        fresh = [pair for pair in tests[kind] if not trained.intersection(pair)]
        write_beir(folder / name, list(dict(fresh).items()))
    return {
        "packages": len({name.rsplit(".", 1)[0] for name in pairs}), "sources": len(entries),
        "pairs": sum(map(len, pairs.values())), "test pairs": sum(map(len, tests.values())),
    }  # fmt: skip


def collect_pairs(packages: tuple[str, ...], max_files: int) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]], set[str]]:
    """Collect pairs from packages.

    Returns:
        Pairs to train on, by PACKAGE.KIND; pairs of held-out modules to test on, by kind; and the texts that are trained on.
    """
    pairs: dict[str, list[Pair]] = {}
    tests: dict[str, list[Pair]] = {"body": [], "code": []}
    trained: set[str] = set()
    for package in progress_bar(packages, desc="Reading docstrings", unit="package"):
        try:
            found = read_definitions(package, max_files)
        except InputError:
            continue
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
    """Mine a hard negative for each pair of the sources in `folder`, on every rank. Returns the file of the mined sources."""
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
    """Return a definition's pair of a kind, if it has both texts."""
    query, document = (getattr(definition, part) for part in KINDS[kind])
    return (query, document) if query and document else None


def write_beir(folder: Path, pairs: list[Pair]) -> None:
    """Write a BEIR folder in which every query has one relevant document, the one it stands with."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, prefix, texts in (("queries", "q", [q for q, _ in pairs]), ("corpus", "d", [d for _, d in pairs])):
        lines = (json.dumps({"_id": f"{prefix}{i}", "text": text}) for i, text in enumerate(texts))
        write_text(folder / f"{name}.jsonl", "\n".join(lines) + "\n")
    qrels = [f"q{i}\td{i}\t1" for i in range(len(pairs))]
    write_text(folder / "qrels" / "test.tsv", "\n".join(["query-id\tcorpus-id\tscore", *qrels]) + "\n")
