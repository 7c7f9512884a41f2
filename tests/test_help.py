"""Tests of --help of every recipe, of positional arguments, and of docs/flags.md."""

import re
import runpy
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import error_of

from hf_embed import ContrastiveTrainingArguments, SimCSE
from hf_embed.kit import cli
from hf_embed.kit.help import CONFIG, HELP, TRAINER, USUAL, sections

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("[!_]*.py"))
SITE_FLAGS = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "site_flags.py")))


@dataclass
class Words:
    """Flags of a recipe of words.

    More about it.
    """

    folder: str = field(metadata={"help": "From where.", "positional": True, "metavar": "FOLDER"})
    repo: str = field(metadata={"help": "Where to.", "positional": True, "metavar": "REPO"})
    branch: str = field(default="main", metadata={"help": "Which branch.", "positional": True})
    count: int = field(default=3, metadata={"help": "How many: 5% of all."})
    kind: str = field(default="a", metadata={"help": "Which.", "choices": ["a", "b"]})
    quoting: bool = field(default=True, metadata={"help": "With quotes."})
    texts: list[str] = field(default_factory=list, metadata={"help": "NAME=PATH of each."})
    unit: bool | None = field(default=None, metadata={"help": "Unit vectors."})


USAGE = "hf-embed words FOLDER REPO [BRANCH] [FLAGS]"


@pytest.fixture(autouse=True)
def started(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["hf-embed words"])


def words(*argv: str) -> Words:
    return cli.parse([Words], argv=list(argv))[0]


@pytest.mark.parametrize(
    "argv",
    [("a", "b"), ("a", "--repo", "b"), ("--folder", "a", "--repo", "b"), ("--repo=b", "--folder=a"),
     ("a", "b", "--count", "3"), ("a", "b", "main")],
)  # fmt: skip
def test_positional_arguments(argv):
    made = words(*argv)
    assert (made.folder, made.repo, made.branch, made.count) == ("a", "b", "main", 3)


def test_positional_arguments_and_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("repo: b\ncount: 7")
    made = words("a", "--config", str(path))
    assert (made.folder, made.repo, made.count) == ("a", "b", 7)
    assert words("--config", str(path), "a", "c").repo == "c"  # the command line overrides the file


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), f"missing: FOLDER and REPO; usage: {USAGE} (--help lists the flags)"),
        (("a",), f"missing: REPO; usage: {USAGE} (--help lists the flags)"),
        (("--count", "3", "--folder", "a"), f"missing: REPO; usage: {USAGE} (--help lists the flags)"),
        (("a", "b", "main", "d"), f"unexpected argument 'd'; usage: {USAGE}"),
        (("a", "b", "--folder", "c"), f"FOLDER is given twice, as 'a' and with --folder; usage: {USAGE}"),
        (("a", "b", "--cuont", "3"), "unknown flag --cuont (did you mean 'count'?); --help lists the flags"),
    ],
)
def test_wrong_positional_arguments(argv, message):
    assert error_of(words, *argv) == message


def shown(capsys, kinds: list[type], *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.parse(kinds, argv=list(argv))
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_text_of_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert (
        shown(capsys, [Words], "a", "--help")
        == f"""usage: {USAGE}

Flags of a recipe of words:
  FOLDER, --folder            From where. (required)
  REPO, --repo                Where to. (required)
  BRANCH, --branch            Which branch. (default: main)
  --count N                   How many: 5% of all. (default: 3)
  --kind {{a,b}}                Which. (default: a)
  --quoting                   With quotes. (default: yes; --no_quoting turns it off)
  --texts NAME=PATH ...       NAME=PATH of each.
  --unit {{true,false}}         Unit vectors.

Flags of every recipe:
  {CONFIG[0]}               {CONFIG[1]}
  {HELP[0]}                {HELP[1]}
"""
    )


def test_the_flags_of_trainer_come_last(capsys):
    short = shown(capsys, [SimCSE, ContrastiveTrainingArguments], "--help")
    for asked in (["--help", "all"], ["--help=all"], ["--help-all"], ["--seed", "1", "--help", "all"]):
        full = shown(capsys, [SimCSE, ContrastiveTrainingArguments], *asked)
        assert "--adam_beta1 X" in full and TRAINER + ":" in full
    assert "--adam_beta1" not in short and f"{TRAINER}; --help all shows the other " in short
    assert short.index("--temperature") < short.index("--pooling") < short.index("--learning_rate X")
    assert len(short.splitlines()) < 110
    names = {field.name for field in ContrastiveTrainingArguments.__dataclass_fields__.values()}
    assert set(USUAL) <= names and all(f"--{name}" in short for name in USUAL)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_flag_has_a_text(path):
    _, parser = SITE_FLAGS.parser_of(path)
    flags = [flag for section in sections(parser.kinds, parser.actions, full=True) for flag in section.flags]
    assert [flag.call for flag in flags if not re.sub(r"^\(.*\)$", "", flag.text.strip())] == []
    seen = {call.removeprefix("--") for flag in flags for call in re.findall(r"--\w+", flag.call)}
    assert seen == parser.names()  # no flag is missing


def test_help_shows_the_docstring_of_the_recipe(capsys, monkeypatch):
    """--help shows the docstring of the recipe, with commands in the form in which the user started it."""
    import hf_embed.entry

    class Recipe:
        __doc__ = "Push.\n\n    python recipes/push.py a b\n"

    monkeypatch.setattr("hf_embed.kit.help.running_recipe", lambda: Recipe)
    assert hf_embed.entry.recipe_command("push") == "hf-embed push"
    assert "\n\nPush.\n\n    hf-embed push a b\n\nFlags of" in shown(capsys, [Words], "--help")


def test_the_page_is_up_to_date():
    """The command `python docs/site_flags.py > docs/flags.md` writes the page."""
    made = SITE_FLAGS.page(ROOT / "recipes")
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == made
    assert all(f"## {path.stem.replace('_', '-')}" in made for path in RECIPES)
    assert str(ROOT) not in made and str(Path.home()) not in made
