"""The README's snippets run, with local files in place of the Hub's; and what it names exists."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_encoder
from worker import WORDS

from hf_embed.kit import command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LOCAL = {
    '"bert-base-uncased"': '"model"',
    '"sentence-transformers/all-nli", "triplet", split="train"': '"csv", data_files="nli.csv", split="train"',
    '"sentence-transformers/stsb", split="validation"': '"csv", data_files="sts.csv", split="train"',
    "eval_steps=100": "eval_steps=1, max_steps=2, use_cpu=True",
    "save_steps=100": "save_steps=1",
}


def write_csv(path: Path, rows: list[list]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def test_training_and_loading_snippets_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_encoder().save_pretrained("model", verify=False)
    pairs = list(zip(WORDS, WORDS[1:] + WORDS[:1]))
    write_csv("nli.csv", [["anchor", "positive", "negative"], *([f"the {a}", f"a {a}", f"no {b}"] for a, b in pairs)])
    write_csv("sts.csv", [["sentence1", "sentence2", "score"], *([a, b, i] for i, (a, b) in enumerate(pairs))])
    train, load = SNIPPETS
    for there, here in LOCAL.items():
        assert there in train
        train = train.replace(there, here)
    exec(compile(train, "README.md", "exec"), {})
    names = {}
    last = load.strip().splitlines()
    for line in last:  # keep what the two encode() lines give
        if ".encode(" in line:
            line = f"vectors_{len(names)} = {line}"
        exec(line, names)
    vectors = [value for name, value in names.items() if name.startswith("vectors_")]
    assert [v.shape for v in vectors] == [(2, 32)] * 2
    np.testing.assert_allclose(*vectors, atol=1e-5)


def test_the_snippets_about_using_a_model_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_encoder().save_pretrained("out", verify=False)
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8").partition("## ONNX")[0]
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "use.md", "exec"), names)
    assert tuple(names["scores"].shape) == (1, 2)
    best = int(names["scores"][0].argmax())
    assert names["hits"][0][0] == {"corpus_id": best, "score": pytest.approx(float(names["scores"][0, best]), abs=1e-6)}
    assert [len(negatives) for negatives in names["mined"]["negatives"]] == [1, 1, 1]
    assert "# Questions about cats" in Path("out", "README.md").read_text()


@pytest.mark.slow
def test_the_onnx_snippets_give_the_encoder_s_vectors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_encoder(normalize=True).save_pretrained("out", verify=False)
    section = (ROOT / "docs" / "use.md").read_text(encoding="utf-8").partition("## ONNX")[2]
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(snippet, "use.md", "exec"), names)
    assert names["vectors"].shape == (3, 32)
    np.testing.assert_allclose(names["vectors"], names["encoder"].encode(names["texts"]), atol=1e-5)
    assert np.abs(names["vectors"] - names["encoder"].encode(names["texts"][::-1])).max() > 1e-2


def test_files_and_recipes_named_in_the_readme_exist():
    for path in re.findall(r"(?:recipes|docs|benchmarks)/[\w./]+\.(?:py|yaml|md)", README):
        assert (ROOT / path).is_file(), path


def test_commands_named_in_the_readme_exist():
    named = set(re.findall(r"hf-embed ([a-z][\w-]+)", README))
    assert named and named <= {*command.recipes(), command.LAUNCH}


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--(\w+)", README)) - {"config_file", "quiet"}))
def test_flags_named_in_the_readme_exist(flag):
    from hf_embed import ContrastiveTrainingArguments, ImprovedContrastive
    from hf_embed.kit import ablation, plan

    kinds = [plan.ModelArguments, plan.DataArguments, plan.EvalArguments, plan.RunArguments,
             ImprovedContrastive, plan.MatryoshkaArguments, plan.PositiveArguments, ablation.AblationArguments,
             ContrastiveTrainingArguments]  # fmt: skip
    names = {name for kind in kinds for name in kind.__dataclass_fields__} | {"config", "help"}
    names |= {f"no_{name}" for kind in kinds for name, field in kind.__dataclass_fields__.items() if field.default is True}
    for recipe in (ROOT / "recipes").glob("[!_]*.py"):  # their own: fields of dataclasses
        names |= set(re.findall(r"^    (\w+): .*= ", recipe.read_text(encoding="utf-8"), re.MULTILINE))
    assert flag in names


def test_links_lead_somewhere():
    """Every link in README.md and docs/ to a file of the repository, and to a heading in one."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    broken = []
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", text):
            name, _, heading = target.partition("#")
            path = (page.parent / name) if name else page
            if not path.exists() or (heading and heading not in headings(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def headings(page: Path) -> set[str]:
    """Return the names by which links lead to the headings of a page, as GitHub makes them."""
    lines = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if re.match(r"#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}
