"""The harness of docs/reliability.md finds the faults that it looks for. The page names tests and commands that exist."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "reliability.py"
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("named", sorted(set(re.findall(r"tests/\w+\.py::\w+", PAGE))))
def test_the_tests_that_the_page_names_exist(named):
    file, name = named.split("::")
    functions = [node.name for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if hasattr(node, "name")]
    assert name in functions


def test_the_commands_that_the_page_names_exist():
    script = SCRIPT.read_text(encoding="utf-8")
    for command in re.findall(r"benchmarks/reliability\.py (\w+)", PAGE):
        assert f'"{command}"' in script
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"make (soak|audit)", PAGE):
        assert f"\n{target}:" in makefile


def harness(*words: str, patch: str = "") -> subprocess.CompletedProcess:
    """Run the harness. `patch` is code that runs first in the same process. It affects every run, because runs are forks."""
    code = f"import sys; sys.argv[0] = {str(SCRIPT)!r}; sys.path.insert(0, {str(SCRIPT.parent)!r})\n{patch}\n"
    code += "from reliability import main; main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["kills", "saves"])
def test_killed_runs_go_on(command):
    done = harness(command, "--count", "2", "--jobs", "1", "--cases", "sup_simcse", "encode")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{command}: 2 " in done.stdout and "2 ended bit for bit" in done.stdout


@pytest.mark.slow
def test_control_other_weights_after_a_kill_are_found():
    """The patch keeps the random state of a checkpoint from being restored, so dropout draws other masks after a resume."""
    patch = "import reliability_runs, transformers\ntransformers.Trainer._load_rng_state = lambda *args: None"
    done = harness("saves", "--count", "3", "--jobs", "1", "--cases", "unsup_simcse", patch=patch)
    assert done.returncode == 1 and "WRONG: model.safetensors differs" in done.stdout, done.stdout + done.stderr
