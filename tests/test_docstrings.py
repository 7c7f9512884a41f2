"""Pairs from the docstrings of Python files: what is used, what is not used, and what is held out for testing."""

import json

import pytest
from conftest import error_of

from hf_embed.data.source_files import read_sources
from hf_embed.evaluation.retrieval import read_retrieval
from hf_embed.kit import docstrings
from hf_embed.kit.docstrings import Definition, held_out, read_definitions, write_sources

MODULE = '''
"""The module's own docstring is not taken, whatever it says."""

def norm(x, ord=None):
    """Matrix or vector
    norm of an array.

    This function is able to return one of eight different matrix norms,
    or one of an infinite number of vector norms.
    """
    x = asarray(x)
    if ord is None:
        return sqrt((x * x).sum())
    raise ValueError(ord)


if True:
    class Shape(object):
        """A shape that has an area and a perimeter."""

        def area(self):
            """The area of the shape in square metres."""
            return self.width * self.height * self.scale ** 2  # long enough to count as code

        def __len__(self):
            """The number of corners that the shape has."""
            return 4

        async def wait(self):
            """Wait until somebody has drawn the shape."""


def short():
    """Too short."""


def undocumented():
    return 1
'''


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "shapes"
    (folder / "sub" / "tests").mkdir(parents=True)
    (folder / "__init__.py").write_text('def first():\n    """The first function of the package."""\n')
    (folder / "sub" / "module.py").write_text(MODULE)
    (folder / "sub" / "tests" / "test_module.py").write_text(MODULE.replace("Matrix", "Tested"))
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    (folder / "copy.py").write_text(MODULE)  # repeats the summaries of sub/module.py
    return folder


def test_definitions(package):
    found = {d.name: d for d in read_definitions(str(package))}
    assert set(found) == {
        "shapes.first", "shapes.copy.norm", "shapes.copy.Shape", "shapes.copy.Shape.area", "shapes.copy.Shape.wait"
    }  # fmt: skip
    norm = found["shapes.copy.norm"]
    assert norm.summary == "Matrix or vector norm of an array."
    assert norm.body.startswith("This function is able") and norm.body.endswith("vector norms.")
    assert norm.code.startswith("def norm(x, ord=None):\n    x = asarray(x)") and norm.code.endswith("raise ValueError(ord)")
    assert norm.summary not in norm.code
    area = found["shapes.copy.Shape.area"]
    assert area.code.startswith("def area(self):\n    return") and area.body == ""
    # A class has no code, and `wait` has nothing but a docstring.
    assert found["shapes.copy.Shape"].code == found["shapes.copy.Shape.wait"].code == ""


def test_long_texts_are_cut(tmp_path):
    body = "word " * 1000
    (tmp_path / "a.py").write_text(
        f'def f():\n    """What this function does.\n\n    {body}\n    """\n    return {"1 + " * 900}1\n'
    )
    (definition,) = read_definitions(str(tmp_path))
    assert len(definition.body) == len(definition.code) == 500


def test_installed_packages_are_found_by_name():
    names = {d.name for d in read_definitions("hf_embed")}
    assert "hf_embed.kit.docstrings.write_sources" in names
    assert len(read_definitions("python", max_files=30)) > 50
    assert error_of(read_definitions, "no_such_package_anywhere") == (
        "no_such_package_anywhere: there is no such file, folder or installed package"
    )  # fmt: skip


def test_max_files_takes_the_same_files_each_time(package):
    assert read_definitions(str(package), max_files=2) == read_definitions(str(package), max_files=2)
    assert len(read_definitions(str(package), max_files=1)) < 5


def test_held_out_is_by_module():
    assert len({held_out(Definition(f"a.module.{name}", "a.module", "", "", "")) for name in ("f", "g", "C.f", "D.f")}) == 1
    share = sum(held_out(Definition("f", f"package.module{i}", "", "", "")) for i in range(4000)) / 4000
    assert 0.1 < share < 0.15


def test_sources_are_read_by_the_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr(docstrings, "PACKAGES", ("evaluate", "accelerate", "absent_package"))
    counts = write_sources(tmp_path / "data")
    assert counts["packages"] == 2 and counts["sources"] == 6
    sources = read_sources(str(tmp_path / "data" / "sources.yaml"))
    names = {f"{p}.{kind}" for p in ("evaluate", "accelerate") for kind in ("body", "name", "code")}
    assert len(sources) == 6 and {source.name for source in sources} == names
    assert sum(source.size for source in sources) == counts["pairs"]
    trained = {text for source in sources for row in source.rows for text in row.values()}
    for name in ("doc_search", "code_search"):
        task = read_retrieval(str(tmp_path / "data" / name))
        assert len(task.qrels) == len(task.corpus) > 5
        # no text of the evaluation is in the training data
        assert not trained & (set(task.queries.values()) | set(task.corpus.values()))
        assert json.dumps(task.qrels).count("1}") == len(task.qrels)


@pytest.mark.parametrize("sign", ["\x0c", "\x0b", "\x1c", "\x85", "\u2028"])
def test_the_code_of_a_function_is_its_own_lines(sign, tmp_path):
    """BUG: a form feed counted as the end of a line, so the code lost its first line and kept the docstring, the query."""
    folder = tmp_path / "paged"
    folder.mkdir()
    before = f"# a page\n{sign}\n" if sign == "\x0c" else f"# a page {sign} of text\n"
    code = "def area(shape):\n    width, height = shape.width * shape.scale, shape.height * shape.scale\n"
    code += "    return width * height"
    docstring = '    """The area of the shape in square metres."""\n'
    source = before + code.replace("\n", "\n" + docstring, 1) + "\n"
    (folder / "module.py").write_text(source, encoding="utf-8", newline="")
    (found,) = read_definitions(str(folder))
    assert found.code == code
