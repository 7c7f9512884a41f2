"""The worked diffs of CONTRIBUTING.md apply to the code as it is, touch one or two files, and do what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"^### (.+?)\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


SECTIONS = {
    title: body
    for title, body in SECTION.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    if blocks(body, "diff")
}


@pytest.mark.parametrize("title", SECTIONS)
def test_an_addition_is_what_the_page_shows(title, tmp_path):
    for part in ("hf_embed", "recipes", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for diff in blocks(SECTIONS[title], "diff"):
        assert len(re.findall(r"^\+\+\+ ", diff, re.MULTILINE)) <= 2
        applied = subprocess.run(["git", "apply", "-"], input=diff, text=True, capture_output=True, cwd=tmp_path)
        assert applied.returncode == 0, applied.stderr
    lint = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--config",
        str(ROOT / "ruff.toml"),
        "hf_embed",
        "recipes",
        "tests",
    ]
    checked = subprocess.run(lint, text=True, capture_output=True, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    settings = {"text": True, "capture_output": True, "cwd": tmp_path, "env": environment, "timeout": 300}
    for code in blocks(SECTIONS[title], "python"):
        done = subprocess.run([sys.executable, "-c", code], **settings)
        assert done.returncode == 0, done.stderr[-3000:]
    for command in "".join(blocks(SECTIONS[title], "bash")).splitlines():
        done = subprocess.run([sys.executable, *command.removeprefix("python ").split()], **settings)
        assert done.returncode == 0, done.stderr[-3000:]


def test_every_kind_of_addition_is_shown():
    kinds = ["objective", "pooling", "evaluation", "positive", "TempScale", "recipe"]
    assert [kind for kind in kinds if not any(kind in title for title in SECTIONS)] == []
