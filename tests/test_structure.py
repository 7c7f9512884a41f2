"""Imports run one way, no attribute of ours is guessed, no module outgrows a reader; see benchmarks/structure.py."""

import ast
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "structure.py"

# Functions over 40 lines or 7 parameters, and why.
LONG = {
    "trainer.__init__": "the arguments of transformers' Trainer, and three of ours",
    "encoder.__init__": "an encoder's settings",
    "encoder.encode": "the arguments of sentence-transformers' encode",
    "chunking.encode_in_chunks": "a batch (four), and how it is cut (four)",
    "checkpoint.hub.push_folder": "the flags of recipes/push.py",
}
# Calls that write a file, and who may make them outside of `with writing(path)`, for what they make is put in place as a whole.
WRITERS = {
    "write_text", "write_bytes", "save", "savefig", "save_file", "save_pretrained", "dump", "to_csv", "to_json", "to_parquet",
    "save_to_disk", "copy", "copyfile", "copytree", "move", "rename", "link", "open_memmap", "open",
}  # fmt: skip
MODULES = {"shutil", "os", "torch", "np", "json", "yaml", "plt"}  # `copy.copy(settings)` writes nothing
NOT_ASIDE = {
    "safe_files": "what the others call",
    "checkpoint.layout": "into the new folder of checkpoint.save",
    "checkpoint.save": "into a new folder, which takes the place of the old one",
    "checkpoint.verify": "into the new folder of checkpoint.save, for the loaders that are compared",
    "checkpoint.training_state": "into a checkpoint, which is renamed when it is whole",
    "checkpoint.hub": "a copy of a checkpoint, to be uploaded and removed",
    "trainer": "into a checkpoint, which is renamed when it is whole",
    "vector_files": "a piece of work within `make_files`, and a memory map",
    "mining": "a piece of work within `make_files`",
    "kit.finetune": "the adapters beside the finished model",
    "kit.seeds": "into a new folder, which takes the place of the old one",
    "kit.overwrite": "an earlier run gets another name before it goes",
    "kit.calibrate": "Encoder.save_pretrained, which puts the folder in place as a whole",
    "recipes.pretrain_encoder": "into a new folder, which takes the place of the old one",
}
MOST_RECIPE_LINES = 80
LONG_RECIPES = {"pretrain_encoder": "a training of its own, not of hf_embed"}


@pytest.fixture(scope="module")
def structure():
    return SimpleNamespace(**runpy.run_path(str(SCRIPT)))


def test_imports_run_one_way(structure):
    assert structure.climbing() == [], "a module imports from a tier below it: move what it needs up"
    assert structure.cycles() == []


def test_a_module_without_a_tier_is_named(structure):
    with pytest.raises(LookupError, match="news is in no tier; add it to TIERS"):
        structure.tier("news.letters")


def test_the_pages_show_the_tiers(structure):
    """CONTRIBUTING.md and docs/design.md say the same as TIERS."""
    for page in ("CONTRIBUTING.md", "docs/design.md"):
        rows = re.findall(r"^\| (\d) \| ([^|]+)\|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        shown = {int(number): set(re.findall(r"`(\w+)`", modules)) for number, modules in rows}
        for number, packages in enumerate(structure.TIERS, 1):
            assert shown[number] == set(packages), page


def test_no_attribute_of_ours_is_guessed(structure):
    assert structure.guessed_attributes() == []
    sources = "".join(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))) for path in structure.modules().values())
    assert [guess for guess in structure.FOREIGN if guess not in sources] == []  # no exception outlives its reason


def test_functions_are_short_or_have_a_reason(structure):
    assert {name for name, *_ in structure.long_functions()} == set(LONG)


def writes(call: ast.Call) -> bool:
    """Whether a call writes a file, or gives one its name."""
    name, owner = (call.func.attr, call.func.value) if isinstance(call.func, ast.Attribute) else (call.func.id, None)
    if name == "open":
        modes = [argument.value for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
                 if isinstance(argument, ast.Constant) and isinstance(argument.value, str)]  # fmt: skip
        return any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in modes)
    if name == "replace":
        return (isinstance(owner, ast.Name) and owner.id == "os") or len(call.args) == 1
    if name in ("copy", "move", "save", "dump", "link"):
        return isinstance(owner, ast.Name) and owner.id in MODULES
    return name in WRITERS


def unguarded_writes(tree: ast.AST) -> list[str]:
    """Calls that write a file and do not stand in `with writing(path)`."""
    guarded = {id(inner) for block in ast.walk(tree) if isinstance(block, ast.With)
               and any("writing(" in ast.unparse(item.context_expr) for item in block.items)
               for inner in ast.walk(block)}  # fmt: skip
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)]
    return [ast.unparse(call) for call in calls if id(call) not in guarded and writes(call)
            and "safe_files" not in ast.unparse(call) and not (isinstance(call.func, ast.Name) and call.func.id != "open"
            and call.func.id not in ("save_file",))]  # fmt: skip


def test_every_file_is_written_aside(structure):
    found = {name: calls for name, path in structure.modules().items()
             if (calls := unguarded_writes(ast.parse(path.read_text(encoding="utf-8"))))}  # fmt: skip
    assert {name: calls for name, calls in found.items() if name not in NOT_ASIDE} == {}, (
        "a file is written in its place, where a killed run leaves half of it: use hf_embed.safe_files"
    )
    assert sorted(set(NOT_ASIDE) - set(found)) == []  # no exception outlives its reason
    for call in ("path.write_text(a)", "open(path, 'w')", "path.open('ab')", "np.save(path, a)", "figure.savefig(path)",
                 "new.replace(path)", "os.replace(a, b)", "shutil.copytree(a, b)"):  # fmt: skip
        assert unguarded_writes(ast.parse(call)) == [call]
        assert unguarded_writes(ast.parse(f"with writing(path) as aside:\n    {call}")) == []
    for call in ("open(path)", "path.open('rb')", "text.replace('a', 'b')", "copy.copy(args)", "write_text(path, text)"):
        assert unguarded_writes(ast.parse(call)) == []


def test_modules_can_be_read_in_one_go(structure):
    modules = structure.modules()
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules.items()}
    assert lines["trainer"] < 350
    recipes = {name.removeprefix("recipes."): count for name, count in lines.items() if name.startswith("recipes.")}
    long = {name: count for name, count in recipes.items() if count > MOST_RECIPE_LINES and name not in LONG_RECIPES}
    assert not long, f"recipes of more than {MOST_RECIPE_LINES} lines: {long}"
    assert max(lines.values()) < 500


def test_the_checks_find_what_they_are_for(tmp_path, monkeypatch):
    """A small package with an import that climbs, a cycle, a guess, and a function with too many parameters."""
    structure = SimpleNamespace(**runpy.run_path(str(SCRIPT)))  # anew, for it remembers the modules that it has read
    package = tmp_path / "hf_embed"
    (package / "kit").mkdir(parents=True)
    (package / "errors.py").write_text("from hf_embed.kit.cli import run\n")
    forms = ["import hf_embed.trainer", "from .trainer import Trainer", "from hf_embed import Trainer", "from . import trainer"]
    for number, form in enumerate(forms):  # each is an import of the trainer, within a function
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
