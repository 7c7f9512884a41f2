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
    "guarded_trainer._maybe_log_save_evaluate": "the parameters of transformers' method",
    "checkpoint_trainer._run_epoch": "the parameters of transformers' Trainer",
    "chunking.encode_in_chunks": "a batch (four), and how it is cut (four)",
    "checkpoint.hub.push_folder": "the flags of recipes/push.py",
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
