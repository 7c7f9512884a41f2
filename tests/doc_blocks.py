"""The code blocks of the documentation: where they are, how each one is marked, and how they are run.

If no test runs a block, a comment above the block says why. The marks are HTML comments, which the rendered page hides:

    <!-- file: train.csv -->        the block is a file; it is written before the blocks below it run
    <!-- slow -->                   a Python block that runs only in the slow suite
    <!-- tested by: tests/test_entry.py::test_name -->      another test runs the block
    <!-- not run: needs the Hub -->

Blocks without a mark are run. The blocks of a page run from top to bottom in one folder. All Python blocks of a page share one
namespace. Bash blocks start processes, so they run only in the slow suite. Blocks of the language `text` show output, not code.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
# Pages whose unmarked blocks are not run, each with the reason.
WITHOUT_MARKS = {
    "docs/results": "the commands of the figures: they need data sets, and some take hours",
    "CONTRIBUTING.md": "tests/test_contributing.py applies the diffs and runs the commands below them",
}
RUN, SLOW, FILE, NOT_RUN, ELSEWHERE = "run", "slow", "file", "not run", "tested by"
FENCE = re.compile(
    r"(?:<!-- (?P<mark>(?:[^-]|-(?!->))+?) -->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """A fenced code block of a page."""

    page: str
    line: int
    language: str
    code: str
    kind: str  # RUN, SLOW, FILE, NOT_RUN or ELSEWHERE
    about: str = ""  # the name of the file, the reason why it is not run, or the test that runs it

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def page_names() -> list[str]:
    return PAGES + sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of a page, in order, except those that show output."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["language"] == "text":
            continue
        line = text.count("\n", 0, match.start("indent")) + 1
        found.append(Block(page, line, match["language"], match["code"], *kind_of(page, match["language"], match["mark"])))
    return found


def kind_of(page: str, language: str, mark: str | None) -> tuple[str, str]:
    """Return the kind of a block, and what its mark says after the colon."""
    name, _, about = (mark or "").partition(":")
    if name.strip() in (FILE, NOT_RUN, ELSEWHERE, SLOW):
        return name.strip(), about.strip()
    for folder, reason in WITHOUT_MARKS.items():
        if page.startswith(folder):
            return NOT_RUN, reason
    return (SLOW if language == "bash" else RUN), ""


def run_page(
    page: str, folder: Path, slow: bool = False, change: Callable[[str], str] = lambda code: code, names: dict | None = None
) -> dict:
    """Run the blocks of a page and return the namespace of its Python blocks.

    Args:
        page: path of the page in the repository.
        folder: the current working folder, where the files of the page are written.
        slow: also run the bash blocks and the Python blocks that are marked as slow.
        change: function that is applied to each Python block, for example to use local files instead of files from the Hub.
        names: namespace that the Python blocks start with.
    """
    names = {} if names is None else names
    for block in blocks_of(page):
        if block.kind == FILE:
            (folder / block.about).write_text(block.code, encoding="utf-8")
        elif block.kind == RUN or (block.kind == SLOW and slow):
            if block.language == "bash":
                run_bash(block, folder)
            else:
                code = "\n" * block.line + change(block.code)  # a traceback then shows the line of the page
                exec(compile(code, block.page, "exec"), names)
    return names


def run_bash(block: Block, folder: Path) -> None:
    """Run a bash block with the Python interpreter of the tests, offline and on the CPU."""
    if not (folder / "recipes").exists():
        (folder / "recipes").symlink_to(ROOT / "recipes")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "-euo", "pipefail", "-c", block.code]
    done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True, timeout=1200)
    assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr, f"{block.place}\n{done.stderr[-2000:]}"
