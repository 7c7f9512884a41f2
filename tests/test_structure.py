"""Imports go in one direction, code does not guess its own attributes, and modules stay short: see benchmarks/structure.py."""

import ast
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "structure.py"

# Functions with more than 40 lines or 7 parameters, and the reason for it.
LONG = {
    "trainer.__init__": "the arguments of transformers' Trainer, and three of ours",
    "encoder.__init__": "an encoder's settings",
    "encoder.encode": "the arguments of sentence-transformers' encode",
    "forward.chunking.encode_in_chunks": "a batch (four), and how it is cut (five)",
    "forward.packed_attention.attend_by_text": "the arguments of an attention function of transformers (eight), and the bounds",
    "checkpoint.hub.push_folder": "the flags of recipes/push.py",
}
# Names of methods that write a file, on any object; and library functions that write a file.
WRITERS = {"write_text", "write_bytes", "savefig", "save_pretrained", "to_csv", "to_parquet", "save_to_disk", "rename"}
LIBRARY_WRITERS = {
    "os.replace", "os.link", "shutil.copy", "shutil.copyfile", "shutil.copytree", "shutil.move", "torch.save", "np.save",
    "json.dump", "yaml.dump", "np.lib.format.open_memmap",
}  # fmt: skip
# Modules that may call one of them outside of `with writing(path)` and `with new_folder(path)`, and the reason. These two put
# a file or a folder in place only when it is complete.
NOT_ASIDE = {
    "files.safe_files": "what the others call",
    "checkpoint.layout": "into the new folder of checkpoint.save",
    "checkpoint.save": "into a new folder, which takes the place of the old one",
    "checkpoint.verify": "into the new folder of checkpoint.save, for the loaders that are compared",
    "checkpoint.training_state": "into a checkpoint, which is renamed when it is whole",
    "checkpoint.whole": "into a checkpoint, which is renamed when it is whole",
    "trainer": "into a checkpoint, which is renamed when it is whole",
    "vector_files": "a piece of work within `make_files`, and the memory map that has been written aside",
    "mining": "a piece of work within `make_files`",
    "kit.calibrate": "Encoder.save_pretrained, which puts the folder in place as a whole",
}
MOST_RECIPE_LINES = 80


@pytest.fixture(scope="module")
def structure():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_imports_run_one_way(structure):
    assert structure.climbing() == [], "a module imports from a tier below it: move what it needs up"
    assert structure.cycles() == []


@pytest.mark.parametrize("script", [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("docs/*.py")], ids=lambda path: path.name)
def test_what_a_script_imports_from_the_package_is_there(script):
    """BUG: benchmarks/mteb_local.py imported a function from a module that it had left. No test runs these scripts."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_embed"):
            names = ", ".join(name.name for name in node.names)
            exec(f"from {node.module} import {names}", {})  # also finds a name that is a module


def test_a_module_without_a_tier_is_named(structure):
    with pytest.raises(LookupError, match="news is in no tier; add it to TIERS"):
        structure.tier("news.letters")


def test_the_page_shows_the_tiers(structure):
    """docs/design.md lists the same tiers as TIERS."""
    rows = re.findall(r"^\| (\d) \| ([^|]+)\|", (ROOT / "docs/design.md").read_text(encoding="utf-8"), re.MULTILINE)
    shown = {int(number): set(re.findall(r"`(\w+)`", modules)) for number, modules in rows}
    assert shown == {number: set(packages) for number, packages in enumerate(structure.TIERS, 1)}


def test_the_page_has_the_reading_list(structure):
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    section = page.partition("## What to read first\n")[2].partition("\n## ")[0]
    shown = re.findall(r"^\d+\. `([\w/]+)\.py`", section, re.MULTILINE)
    assert [name.replace("/", ".") for name in shown] == structure.READING


def test_no_picture_is_drawn_with_pyplot():
    """It has one current backend, which belongs to the user."""
    assert [path for path in (ROOT / "hf_embed").rglob("*.py") if "pyplot" in path.read_text(encoding="utf-8")] == []


def test_no_attribute_of_ours_is_guessed(structure):
    assert structure.guessed_attributes() == []
    sources = "".join(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))) for path in structure.modules().values())
    assert [guess for guess in structure.FOREIGN if guess not in sources] == []  # every entry of FOREIGN is still needed


def test_functions_are_short_or_have_a_reason(structure):
    assert {name for name, *_ in structure.long_functions()} == set(LONG)


def writes(call: ast.Call) -> bool:
    """Return True if a call writes or renames a file."""
    name = ast.unparse(call.func)
    method = name.rpartition(".")[2]
    texts = [value.value for value in call.args if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    if method == "open":
        return any(set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts)
    if method == "replace":  # Path.replace has one argument, str.replace has two, and dataclasses.replace has keywords
        return name in LIBRARY_WRITERS or (len(call.args) == 1 and not call.keywords)
    return name in LIBRARY_WRITERS | {"save_file"} or ("." in name and method in WRITERS)


def unguarded_writes(tree: ast.AST) -> list[str]:
    """Return the calls that write a file outside of `with writing(path)` and `with new_folder(path)`."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.With)]
    guards = [block for block in blocks if any(re.match(r"(writing|new_folder)\(", ast.unparse(item)) for item in block.items)]
    guarded = {inner for block in guards for inner in ast.walk(block)}
    return [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in guarded and writes(node)]


def test_every_file_is_written_aside(structure):
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in structure.modules().items()}
    found = {name: calls for name, tree in trees.items() if (calls := unguarded_writes(tree))}
    assert {name: calls for name, calls in found.items() if name not in NOT_ASIDE} == {}, (
        "a file is written in its place, where a killed run leaves half of it: use hf_embed.files.safe_files"
    )
    assert sorted(set(NOT_ASIDE) - set(found)) == []  # every entry of NOT_ASIDE is still needed
    for call in ("path.write_text(a)", "open(path, 'w')", "path.open('ab')", "np.save(path, a)", "figure.savefig(path)",
                 "new.replace(path)", "os.replace(a, b)", "shutil.copytree(a, b)", "save_file(a, path)"):  # fmt: skip
        assert unguarded_writes(ast.parse(call)) == [call]
        assert unguarded_writes(ast.parse(f"with writing(path) as aside:\n    {call}")) == []
    for call in ("open(path)", "path.open('rb')", "text.replace('a', 'b')", "replace(plan, a=1)", "write_text(path, text)"):
        assert unguarded_writes(ast.parse(call)) == []


def test_modules_can_be_read_in_one_go(structure):
    modules = structure.modules()
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    assert lines["trainer"] < 350
    recipes = {name.removeprefix("recipes."): count for name, count in lines.items() if name.startswith("recipes.")}
    long = {name: count for name, count in recipes.items() if count > MOST_RECIPE_LINES}
    assert not long, f"recipes of more than {MOST_RECIPE_LINES} lines: {long}"
    assert max(lines.values()) < 500


def test_the_checks_find_what_they_are_for(tmp_path, monkeypatch):
    """The package made here has imports from later tiers, a cycle, a guessed attribute, and a function of eight parameters."""
    structure = SimpleNamespace(**runpy.run_path(str(SCRIPT)))  # run again, because it caches the modules it has read
    package = tmp_path / "hf_embed"
    (package / "kit").mkdir(parents=True)
    (package / "errors.py").write_text("from hf_embed.kit.cli import run\n")
    forms = ["import hf_embed.trainer", "from .trainer import Trainer", "from hf_embed import Trainer", "from . import trainer"]
    for number, form in enumerate(forms):  # each form imports the trainer inside a function
        (package / "data").mkdir(exist_ok=True)
        relative = form.replace("from .", "from ..") if form.startswith("from .") else form
        (package / "data" / f"form{number}.py").write_text(f"def find():\n    {relative}\n")
    (package / "trainer.py").write_text("class Trainer:\n    pass\n")
    (package / "kit" / "cli.py").write_text("from hf_embed import errors\n\n\ndef run(a, b, c, d, e, f, g, h):\n    pass\n")
    (package / "encoder.py").write_text(
        "class Encoder:\n    def __init__(self):\n        self.pooling = getattr(self, 'pooling', None)\n\n\n"
        "def save():\n    from hf_embed.checkpoint import save\n\n\ndef card():\n    from hf_embed.checkpoint import card\n"
    )
    (package / "checkpoint").mkdir()
    for name in ("save", "card"):
        (package / "checkpoint" / f"{name}.py").write_text("")
    (tmp_path / "recipes").mkdir()
    monkeypatch.setitem(structure.tier.__globals__, "ROOT", tmp_path)
    assert sorted(structure.climbing()) == [
        ("data.form0", "trainer"), ("data.form1", "trainer"), ("data.form2", "__init__"), ("data.form3", "trainer"),
        ("encoder", "checkpoint.card"), ("errors", "kit.cli"),
    ]  # fmt: skip
    assert [sorted(set(cycle)) for cycle in structure.cycles()] == [["errors", "kit.cli"]]
    assert structure.guessed_attributes() == ["encoder, line 3: getattr(self, 'pooling', None)"]
    assert structure.long_functions() == [("kit.cli.run", 2, 8)]
