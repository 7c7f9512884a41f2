"""The worked diffs of CONTRIBUTING.md apply to the current code, change one or two files, and do what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^### (.+?)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


SECTIONS = {title: body for title, body in SECTION.findall(PAGE) if blocks(body, "diff")}


def apply(title: str, folder: Path) -> None:
    """Copy the code to a folder and apply the diff of a section to the copy."""
    for part in ("hf_embed", "recipes", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", folder)  # setup.cfg holds the settings of pytest
    (diff,) = blocks(SECTIONS[title], "diff")
    assert 1 <= len(re.findall(r"^\+\+\+ ", diff, re.MULTILINE)) <= 2
    applied = subprocess.run(["git", "apply", "-C1", "-"], input=diff, text=True, capture_output=True, cwd=folder)
    mend = f"CONTRIBUTING.md, '{title}': the code around the diff has changed, so make that diff anew, with one line of context"
    assert applied.returncode == 0, f"{mend}: {applied.stderr}"


def test_every_kind_of_addition_is_shown():
    kinds = ["objective", "pooling", "evaluation", "positive", "TempScale", "recipe"]
    assert [kind for kind in kinds if not any(kind in title for title in SECTIONS)] == []


@pytest.mark.parametrize("title", SECTIONS)
def test_a_diff_of_the_page_applies_and_passes_the_linter(title, tmp_path):
    apply(title, tmp_path)
    lint = [sys.executable, "-m", "ruff", "--no-cache", "--config", str(ROOT / "ruff.toml")]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([*lint[:3], *command, *lint[3:], "."], text=True, capture_output=True, cwd=tmp_path)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("title", SECTIONS)
def test_what_a_diff_imports_is_there(title):
    """BUG: a diff imported a name that the package had renamed. It applied, and only the slow test below ran it."""
    (diff,) = blocks(SECTIONS[title], "diff")
    for module, names in re.findall(r"^\+from (hf_embed[\w.]*) import (.+)$", diff, re.MULTILINE):
        if f"+++ b/{module.replace('.', '/')}.py" not in diff:  # else the diff makes or changes this module
            exec(f"from {module} import {names}", {})


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_an_addition_does_what_the_page_says(title, tmp_path):
    apply(title, tmp_path)
    commands = [["-c", code] for code in blocks(SECTIONS[title], "python")]
    commands += [line.removeprefix("python ").split() for line in "".join(blocks(SECTIONS[title], "bash")).splitlines()]
    assert commands
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], text=True, capture_output=True, cwd=tmp_path, env=environment, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
