"""The documentation: its code blocks, commands, links and notebook.

Every code block runs or says why not. Commands use flags that exist. Links have a target. The notebook runs.
"""

import ast
import configparser
import csv
import functools
import inspect
import json
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import doc_blocks
import numpy as np
import pytest
import yaml
from conftest import small_tokenizer, tiny_encoder
from doc_blocks import ELSEWHERE, FILE, NOT_RUN, ROOT, RUN, SLOW, blocks_of, page_names, run_page
from worker import WORDS

import hf_embed
from hf_embed import ContrastiveTrainingArguments
from hf_embed.kit import command
from hf_embed.tempscale import registry

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
SITE_FLAGS = SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "site_flags.py")))
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = {page: blocks_of(page) for page in page_names()}
SCRIPTS = ["from_sentence_transformers.md", "own_script.md", "scores_and_teachers.md"]  # guides that train "bert-base-uncased"
# Replacements in the code of the pages: local files instead of the Hub's models and datasets, and fewer training steps.
LOCAL = {
    '"bert-base-uncased"': '"model"',
    '"BAAI/bge-base-en-v1.5"': '"model"',
    '"sentence-transformers/all-nli", "triplet", split="train"': '"csv", data_files="nli.csv", split="train"',
    '"sentence-transformers/stsb", split="validation"': '"csv", data_files="sts.csv", split="train"',
    "eval_steps=100": "eval_steps=1, max_steps=2, use_cpu=True",
    "save_steps=100": "save_steps=1",
}


def write_csv(path: str, rows: list[list]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def prepare(page: str) -> None:
    """Create the files that a page expects in the current working folder."""
    if page in ("README.md", "docs/tempscale.md") or page.removeprefix("docs/guides/") in SCRIPTS:
        tiny_encoder().save_pretrained("model", verify=False)
        pairs = list(zip(WORDS, WORDS[1:] + WORDS[:1]))
        write_csv("nli.csv", [["anchor", "positive", "negative"], *([f"the {a}", f"a {a}", f"no {b}"] for a, b in pairs)])
        write_csv("sts.csv", [["sentence1", "sentence2", "score"], *([a, b, i] for i, (a, b) in enumerate(pairs))])
    if page in ("docs/use.md", "docs/guides/publishing.md", "docs/api/evaluation.md"):
        tiny_encoder(normalize=True).save_pretrained("out", verify=False)
    if page == "docs/guides/lora.md":
        small_tokenizer().save_pretrained("encoder")


def local(code: str) -> str:
    """Return the code with local files instead of the Hub's. The results of README's encode calls are kept in `vectors`."""
    for there, here in LOCAL.items():
        code = code.replace(there, here)
    return re.sub(
        r"(?m)^(\w+(?:\.from_pretrained)?\(\S+\)\.encode\(.*?\]\))", r"vectors = [*globals().get('vectors', []), \1]", code
    )


def check_use(names: dict) -> None:
    assert tuple(names["scores"].shape) == (1, 2)
    best = int(names["scores"][0].argmax())
    assert names["hits"][0][0] == {"corpus_id": best, "score": pytest.approx(float(names["scores"][0, best]), abs=1e-6)}
    assert [len(negatives) for negatives in names["mined"]["negatives"]] == [1, 1, 1]
    assert "# Questions about cats" in Path("out", "README.md").read_text()
    if "session" in names:  # the page defines an ONNX session
        assert names["vectors"].shape == (3, 32)
        np.testing.assert_allclose(names["vectors"], names["encoder"].encode(names["texts"]), atol=1e-5)
        assert np.abs(names["vectors"] - names["encoder"].encode(names["texts"][::-1])).max() > 1e-2


def check_equal(*vectors: np.ndarray) -> None:
    assert [v.shape for v in vectors] == [(2, 32)] * 2
    np.testing.assert_allclose(*vectors, atol=1e-5)


def check_readme(names: dict) -> None:
    if "vectors" in names:  # README shows two ways to load a model
        check_equal(*names["vectors"])


def check_tempscale(names: dict) -> None:
    assert "MyAttention" in registry.HANDLERS
    assert Path("bge-tempscale", "model.safetensors").is_file()


CHECKS = {
    "README.md": check_readme,
    "docs/use.md": check_use,
    "docs/guides/own_script.md": lambda names: check_equal(names["ours"], names["theirs"]),
    "docs/guides/lora.md": lambda names: names["vectors"].shape == (2, 32) or pytest.fail("the vectors are of another shape"),
    "docs/tempscale.md": check_tempscale,
    "docs/api/evaluation.md": lambda names: names["score"]["triplet_accuracy"] in (0, 100) or pytest.fail("this is no share"),
}


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "HANDLERS", registry.HANDLERS.copy())
    prepare(page)
    CHECKS.get(page, lambda names: None)(run_page(page, folder, slow, local))


# ---- code blocks ----


def pages_with(kind: str) -> list[str]:
    return [page for page, blocks in BLOCKS.items() if any(block.kind == kind for block in blocks)]


@pytest.mark.parametrize("page", pages_with(RUN))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with(SLOW))
def test_all_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    run(page, tmp_path, monkeypatch, slow=True)


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_is_run_or_says_why_not(page):
    for block in BLOCKS[page]:
        if block.kind in (RUN, SLOW):
            assert block.language in ("python", "bash"), f"{block.place}: say what is done with it; see tests/doc_blocks.py"
        elif block.kind == ELSEWHERE:
            file, _, name = block.about.partition("::")
            names = [node.name for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body if hasattr(node, "name")]
            assert name in names, f"{block.place}: there is no test {block.about}"
        elif block.kind == FILE:
            assert re.fullmatch(r"[\w.-]+", block.about), f"{block.place}: name the file"
        else:
            assert block.kind == NOT_RUN and len(block.about) > 10, f"{block.place}: say why it is not run"
    text = (ROOT / page).read_text(encoding="utf-8")
    marks = re.findall(r"<!-- (.*?) -->\n+ *```", text)
    assert [mark for mark in marks if mark.partition(":")[0] not in (FILE, SLOW, NOT_RUN, ELSEWHERE)] == []
    if not page.startswith("docs/results"):  # the commands of these pages take hours, and they are indented instead of fenced
        assert re.findall(r"(?m)^\n {4}(?:\$ )?(?:python|hf-embed|make|pip|accelerate) .*", text) == [], "fence it, and mark it"


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if any(b.language == "bash" for b in blocks)])
def test_the_syntax_of_bash_is_right(page):
    """The syntax is also right in the blocks that are not run."""
    for block in BLOCKS[page]:
        if block.language == "bash":
            done = subprocess.run(["bash", "-n", "-c", block.code], text=True, capture_output=True)
            assert done.returncode == 0, f"{block.place}: {done.stderr}"


def test_a_block_without_a_reason_is_found(tmp_path, monkeypatch):
    page = "<!-- not run: needs the Hub -->\n```bash\na\n```\n```yaml\nb: 1\n```\n"
    page += "<!-- slow -->\n```python\nc\n```\n```text\nd\n```\n"
    (tmp_path / "page.md").write_text(page)
    monkeypatch.setattr(doc_blocks, "ROOT", tmp_path)
    found = [(block.line, block.kind, block.about) for block in blocks_of("page.md")]
    assert found == [(2, NOT_RUN, "needs the Hub"), (5, RUN, ""), (9, SLOW, "")]


# ---- commands ----


def commands_of(page: str) -> list[list[str]]:
    """Return the words of each command in the bash blocks and the indented blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    lines = "".join(block.code for block in BLOCKS[page] if block.language == "bash")
    lines += "".join(re.findall(r"(?m)^ {4}((?:python|hf-embed) (?:.*\\\n)*.*\n)", text))
    lines = re.sub(r"\\\n\s*", " ", lines).replace("$((", "((").splitlines()
    found = []
    for line in lines:
        with_recipe = re.search(r"(?:python -m |python |hf-embed |srun |accelerate launch ).*", line.partition(" #")[0])
        if with_recipe:
            try:
                found.append(shlex.split(with_recipe[0]))
            except ValueError:  # the match is only a part of a longer shell command
                found.append(with_recipe[0].replace("'", "").replace('"', "").split())
    return found


@functools.cache
def flags_of(recipe: str) -> set[str]:
    _, parser = SITE_FLAGS.parser_of(ROOT / "recipes" / f"{recipe}.py")
    return parser.names() | {"config", "help"} | {f"no_{name}" for name in parser.names()}


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_name_recipes_and_flags_that_exist(page):
    recipes = {name.replace("-", "_") for name in command.recipes()}
    for words in commands_of(page):
        named = [re.sub(r"^(?:recipes/|hf_embed\.recipes\.)|\.py$", "", word).replace("-", "_") for word in words]
        place = next((i for i, name in enumerate(named) if name in recipes), None)
        if place is None:
            scripts = [word for word in words if re.fullmatch(r"benchmarks/\w+\.py", word)]
            assert all((ROOT / script).is_file() for script in scripts), words
            continue
        if page == "CONTRIBUTING.md":  # its commands use recipes and flags that its diffs add
            continue
        flags = [word[2:].partition("=")[0] for word in words[place:] if re.match(r"--\w", word)]
        assert set(flags) <= flags_of(named[place]), words


def test_files_and_recipes_named_in_the_readme_exist():
    for path in re.findall(r"(?:recipes|docs|benchmarks)/[\w./]+\.(?:py|yaml|md)", README):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", BLOCKS)
def test_commands_named_in_a_page_exist(page):
    named = set(re.findall(r"(?<![\w/.-])hf-embed ([a-z][\w-]+)", (ROOT / page).read_text(encoding="utf-8")))
    assert named <= {*command.recipes(), command.LAUNCH}


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--(\w+)", README)) - {"config_file", "quiet"}))
def test_flags_named_in_the_readme_exist(flag):
    assert any(flag in flags_of(path.stem) for path in (ROOT / "recipes").glob("[!_]*.py"))


# ---- links ----


def texts_of_pages() -> dict[str, str]:
    """Return the Markdown of every page, and of the notebook, without code blocks."""
    names = [*page_names(), "CHANGELOG.md"]
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in names}
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    texts["docs/quickstart.ipynb"] = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return {name: re.sub(r"```.*?```", "", text, flags=re.DOTALL) for name, text in texts.items()}


def repository() -> str:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return settings["metadata"]["url"]


def broken_links(texts: dict[str, str]) -> list[str]:
    """Return the links to files that do not exist in the repository, and to headings that do not exist in their page."""
    broken = []
    own = re.compile(rf"{re.escape(repository())}/(?:blob|tree|raw)/main/")
    for name, text in texts.items():
        for target in re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", text):
            folder = (ROOT / name).parent
            if own.match(target):  # a full address, which also works on the page of the package index
                folder, target = ROOT, own.sub("", target)
            if re.match(r"[a-z]+:", target):
                continue
            file, _, heading = target.partition("#")
            path = (folder / file) if file else ROOT / name
            if not path.exists() or (heading and heading not in headings(path)):
                broken.append(f"{name}: {target}")
    return broken


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them. Links to headings use these anchors."""
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title)).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    """Every link of the pages and the notebook to a file of the repository, or to a heading in it, has a target."""
    texts = texts_of_pages()
    assert sum(text.count("](") for text in texts.values()) > 100
    assert broken_links(texts) == []


def test_a_broken_link_is_found():
    text = "[a](docs/gte.md#the-loss) [b](docs/gte.md#no-such) [c](docs/none.md) [d](https://example.org/x.md)"
    text += f" [e]({repository()}/blob/main/docs/gte.md) [f]({repository()}/blob/main/docs/none.md)"
    assert broken_links({"README.md": text}) == [
        "README.md: docs/gte.md#no-such", "README.md: docs/none.md", "README.md: docs/none.md",
    ]  # fmt: skip


# ---- the site ----


def test_every_page_is_in_the_navigation():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def pages(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [page for inner in (part.values() if isinstance(part, dict) else part) for page in pages(inner)]

    # docs/site_hooks.py creates these pages from files outside docs/ and from the notebook.
    made = {"index.md", "contributing.md", "security.md", "changelog.md", "quickstart_notebook.md"}
    there = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    listed = pages(site["nav"])
    assert len(listed) == len(set(listed)) and set(listed) == there | made


def test_every_public_name_is_in_the_reference():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"(?m)^::: hf_embed\.[\w.]+\.(\w+)$", text)
    assert set(hf_embed.__all__) <= set(named) and len(named) == len(set(named))


def documented() -> dict[str, tuple[Any, str]]:
    """Return every function and class that the API pages show, and the text of its page, by its name. Methods: CLASS.METHOD."""
    found: dict[str, tuple[Any, str]] = {}
    for page in (ROOT / "docs" / "api").glob("*.md"):
        text = page.read_text(encoding="utf-8") + "\n"
        for path, options in re.findall(r"(?m)^::: (hf_embed\.[\w.]+)\n((?: .*\n)*)", text):
            thing, name = pkgutil.resolve_name(path), path.rpartition(".")[2]
            members = (yaml.safe_load(options) or {"options": {}})["options"].get("members") or []
            found |= {name: (thing, text)} | {f"{name}.{member}": (getattr(thing, member), text) for member in members}
    return found


def undescribed(thing: Any, page: str = "") -> list[str]:
    """Return the parameters of a function or class that neither its docstring, its page nor a help text mentions."""
    if not callable(thing) or thing is ContrastiveTrainingArguments:  # a property; the fields of TrainingArguments
        return []
    helped = [field.name for field in getattr(thing, "__dataclass_fields__", {}).values() if "help" in field.metadata]
    text = f"{inspect.getdoc(thing)} {helped}"
    names = [name for name, given in inspect.signature(thing).parameters.items() if given.kind is not given.VAR_KEYWORD]
    return [name for name in names if name != "self" and not re.search(rf"\b{name}\b", text) and f"`{name}`" not in page]


@pytest.mark.parametrize("name", documented())
def test_every_parameter_in_the_reference_is_described(name):
    assert not undescribed(*documented()[name])


def test_a_parameter_without_a_description_is_found():
    def scale(vector, factor):
        """Multiply a vector by a number."""

    assert undescribed(scale) == ["factor"]


# ---- the notebook ----


def test_the_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4 and len(text) < 20_000
    for word in (str(ROOT), str(Path.home()), "/tmp", "/home/", "site-packages", "Warning", "Error"):
        assert word not in text
    assert all(not line.lstrip().startswith(("!", "%")) for cell in notebook["cells"] for line in cell["source"])
    assert [output["output_type"] for cell in notebook["cells"] for output in cell.get("outputs", [])].count("error") == 0


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """The notebook runs offline, from top to bottom, in its own process."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings = {"cwd": tmp_path, "env": environment, "text": True, "capture_output": True, "timeout": 900}
    done = subprocess.run([sys.executable, "notebook.py"], **settings)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    before, after = (float(number) for number in re.search(r"before ([\d.]+), after ([\d.]+)", done.stdout).groups())
    assert after > before
