"""The files of versions agree with setup.cfg."""

import configparser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def requirements() -> list[Requirement]:
    """All that setup.cfg requires, its extras included."""
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
