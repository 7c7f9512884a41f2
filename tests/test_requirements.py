"""The versions agree in all files, and the links of the README work on the package index."""

import configparser
import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hf_embed.version import __version__

ROOT = Path(__file__).parent.parent


def requirements() -> list[Requirement]:
    """Return all requirements in setup.cfg, including those of the extras."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lists = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    return [Requirement(line) for text in lists for line in text.splitlines() if line]


def pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    pinned = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(pinned) == len(pairs)
    return pinned


def test_the_lowest_versions_are_the_lower_bounds():
    bounds = {}
    for requirement in requirements():
        (lower,) = [specifier for specifier in requirement.specifier if specifier.operator == ">="]
        bound = bounds.setdefault(canonicalize_name(requirement.name), Version(lower.version))
        assert bound == Version(lower.version), f"{requirement.name} has two lower bounds"
    assert pins("constraints-lowest.txt") == bounds


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_a_pinned_version_is_allowed(requirement):
    assert pins("constraints.txt")[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_version_is_the_same_everywhere():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    assert config["metadata"]["version"] == "attr: hf_embed.version.__version__"
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == __version__
    heads = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert heads[0] == "[Unreleased]" and all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", head) for head in heads[1:])


def test_links_of_the_readme_work_on_the_package_index():
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shown = module.long_description()
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", shown)
    assert len(links) > 10 and all(link.startswith(("https://", "#")) for _, link in links)
    ours = re.findall(r"https://github.com/hf-embed/hf_embed/(blob|raw)/main/([^)#\s]+)", shown)
    assert len(ours) > 5 and all((ROOT / path).exists() for _, path in ours)
    assert all((kind == "raw") == path.endswith(".png") for kind, path in ours)
