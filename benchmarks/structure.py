"""Print the structure of the code in numbers: modules, lines, imports between tiers, long functions, files per addition.

    python benchmarks/structure.py

The script reads the sources and runs none of them. tests/test_structure.py fails if a module imports from a later tier or if
imports form a cycle.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 40  # lines of a function, without its docstring, comments and blank lines
MOST_PARAMETERS = 7

# A module imports from its own tier and from those above it in this list, never from those below it.
TIERS = [
    ["distributed", "entry", "errors", "files", "hub_access", "library_internals", "progress", "ranges", "ranks", "version"],
    ["adapters", "data", "encoding", "evaluation", "fingerprint", "forward", "objectives", "pooling", "search", "tempscale",
     "text_models", "vectors"],
    ["encoder"],
    ["arguments", "averaging", "checkpoint", "mining", "step", "training", "vector_files"],
    ["trainer"],
    ["kit"],
    ["recipes"],
]  # fmt: skip
# What makes a training step, a saved folder and TempScale, in the order in which docs/design.md recommends to read it.
READING = [
    "recipes.sup_simcse", "trainer", "data.tokenization", "data.sampling", "data.collator", "step", "forward.chunking",
    "forward.packing", "pooling", "distributed", "objectives.base", "objectives.simcse", "objectives.gte", "encoder",
    "checkpoint.save", "checkpoint.layout", "checkpoint.verify", "tempscale.config", "tempscale.registry",
    "tempscale.attention", "tempscale.fold",
]  # fmt: skip
# The only imports from a later tier that are allowed: methods of Encoder import checkpoint when they load or save.
EXCEPTIONS = {("encoder", "checkpoint.load"), ("encoder", "checkpoint.save")}
NO_CORE = ("tempscale", "kit", "recipes")

# Allowed uses of getattr and hasattr: the object is not ours, but a class of ours has an attribute of the same name.
FOREIGN = {
    "getattr(model.config, 'temp_scale', None)": "an entry in config.json, which other models do not have",
    "getattr(encoder.base.config, 'temp_scale', None)": "the same",
    "hasattr(model, 'config')": "whatever a user gives as a model",
    "hasattr(texts, 'columns')": "whatever a user gives as texts",
    "getattr(getattr(backbone, 'pooler', None), 'dense', None)": "many architectures have no such pooler",
    "hasattr(getattr(self.base, 'pooler', None), 'dense')": "the same",
    "getattr(backbone.config, 'hidden_size', None)": "some configurations call it otherwise",
    "getattr(optimizer, 'optimizer', optimizer)": "accelerate wraps an optimizer, but not before the training",
    "getattr(trainer.optimizer, 'optimizer', trainer.optimizer)": "the same",
}


@cache
def modules() -> dict[str, Path]:
    """Return the file of every module and recipe by its name, such as "checkpoint.load" and "recipes.push"."""
    found = {}
    for path in sorted([*(ROOT / "hf_embed").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts if parts[0] == "recipes" else parts[1:]).removesuffix(".__init__")
        if name not in ("__init__", "recipes"):  # hf_embed/__init__.py imports everything public
            found[name] = path
    return found


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the package modules that a file imports, and whether each is imported at load time (not in a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {node for function in functions(tree) for node in ast.walk(function)}
    typing = {node for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
              for node in ast.walk(block)}  # fmt: skip
    inside = path.is_relative_to(ROOT / "hf_embed")
    package = ["hf_embed", *path.relative_to(ROOT / "hf_embed").parent.parts] if inside else []
    found = []
    for node in ast.walk(tree):
        if node in typing or not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []  # resolves a relative import
            module = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{module}.{name}" for name in names]
        for name in names:
            if name.split(".")[0] == "hf_embed":
                found.append((module_of(name.removeprefix("hf_embed").removeprefix(".")), node not in inner))
    return found


def module_of(name: str) -> str:
    """Return the module that an import loads: "errors" for "errors.InputError", "__init__" for "" and "InputError"."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or "__init__"


def tier(module: str) -> int:
    """Return the number of a module's tier, counted from 0."""
    package = module.split(".")[0]
    if package == "__init__":  # it imports everything public
        return tier("trainer")
    for number, packages in enumerate(TIERS):
        if package in packages:
            return number
    raise LookupError(
        f"{package} is in no tier; add it to TIERS in benchmarks/structure.py, CONTRIBUTING.md and docs/design.md"
    )


def climbing() -> list[tuple[str, str]]:
    """Return imports of a module in a later tier, except those in EXCEPTIONS."""
    return [
        (name, imported)
        for name, path in modules().items()
        for imported, at_load in imports(path)
        if tier(imported) > tier(name) and (at_load or (name, imported) not in EXCEPTIONS)
    ]


def cycles() -> list[list[str]]:
    """Return cycles: modules that import each other at load time, directly or through others."""
    graph = {name: {i for i, at_load in imports(path) if at_load and i != "__init__"} for name, path in modules().items()}
    found, done = [], set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in done:
            for imported in graph.get(name, ()):
                visit(imported, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def body_lines(function: ast.FunctionDef, lines: list[str]) -> int:
    """Return the number of lines of a function without its docstring, comments and blank lines."""
    docstring = function.body[0] if ast.get_docstring(function) else None
    skipped = set(range(docstring.lineno, docstring.end_lineno + 1)) if docstring else set()
    numbers = range(function.lineno, function.end_lineno + 1)
    return sum(n not in skipped and bool(lines[n - 1].split("#")[0].strip()) for n in numbers)


def long_functions() -> list[tuple[str, int, int]]:
    """Return (name, lines, parameters) of each function with too many lines or parameters."""
    found = []
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        for function in functions(ast.parse(text)):
            given = function.args
            parameters = [
                a.arg for a in [*given.posonlyargs, *given.args, *given.kwonlyargs] if a.arg not in ("self", "cls", "ctx")
            ]
            lines = body_lines(function, text.splitlines())
            if lines > LONGEST or len(parameters) > MOST_PARAMETERS:
                found.append((f"{name}.{function.name}", lines, len(parameters)))
    return sorted(found, key=lambda entry: -entry[1])


def own_attributes() -> set[str]:
    """Return the names of all attributes of the classes in this package."""
    names = set()
    for path in modules().values():
        for kind in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(kind, ast.ClassDef):
                continue
            for node in kind.body:
                names |= {node.target.id} if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else set()
                names |= {t.id for t in node.targets if isinstance(t, ast.Name)} if isinstance(node, ast.Assign) else set()
                names |= {node.name} if isinstance(node, ast.FunctionDef) else set()
            for node in ast.walk(kind):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                    names.add(node.attr)
    return names


def guessed_attributes() -> list[str]:
    """Return places where `hasattr`, or `getattr` with a default, asks for an attribute that a class of ours has."""
    own, found = own_attributes(), []
    for name, path in modules().items():
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            guess = call.func.id == "hasattr" or (call.func.id == "getattr" and len(call.args) == 3)
            named = guess and isinstance(call.args[1], ast.Constant) and call.args[1].value in own
            if named and ast.unparse(call) not in FOREIGN:
                found.append(f"{name}, line {call.lineno}: {ast.unparse(call)}")
    return found


def additions() -> dict[str, int]:
    """Return, for each worked diff in CONTRIBUTING.md, the number of files that it changes or adds."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### (.+?)\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    return {title: len(re.findall(r"^\+\+\+ ", body, re.MULTILINE)) for title, body in sections if "```diff" in body}


def code_lines(text: str) -> int:
    """Return the number of lines of a module without its docstrings, comments and blank lines."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            skipped |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(n not in skipped and bool(line.split("#")[0].strip()) for n, line in enumerate(text.splitlines(), 1))


def count(names: list[str]) -> str:
    texts = [modules()[name].read_text(encoding="utf-8") for name in names]
    lines, code = sum(len(text.splitlines()) for text in texts), sum(map(code_lines, texts))
    return f"{len(names)} modules, {lines:,} lines, of them {code:,} of code"


def main() -> None:
    package = [name for name in modules() if not name.startswith("recipes.")]
    core = [name for name in package if name.split(".")[0] not in NO_CORE]
    recipes = [name for name in modules() if name.startswith("recipes.")]
    print(f"package                  {count(package)} (without docstrings, comments and blank lines)")
    print(f"  core                   {count(core)} (all but tempscale and kit)")
    print(f"recipes                  {count(recipes)}")
    print(f"reading list             {count(READING)}")
    print(f"import tiers             {len(TIERS)}")
    print(f"imports that climb       {len(climbing())}, beside {len(EXCEPTIONS)} inside methods of Encoder")
    print(f"cycles                   {len(cycles())}")
    print(f"guessed own attributes   {len(guessed_attributes())}")
    print("files touched by adding  " + ", ".join(f"{what}: {files}" for what, files in additions().items()))
    print(f"functions of over {LONGEST} lines or {MOST_PARAMETERS} parameters (without docstrings, comments and blank lines):")
    for name, lines, parameters in long_functions():
        print(f"  {name:50} {lines:3} lines, {parameters} parameters")


if __name__ == "__main__":
    main()
