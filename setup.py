"""Build the package. The metadata is in setup.cfg; only the README needs code, because the package index has no other files."""

import configparser
import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)\s]+)\)")


def long_description() -> str:
    """Return README.md with absolute links and pictures. Their address begins with the `url` of setup.cfg."""
    config = configparser.ConfigParser()
    config.read(HERE / "setup.cfg", encoding="utf-8")
    url = config["metadata"]["url"]

    def absolute(link: re.Match[str]) -> str:
        picture, text, path = link.groups()
        return f"{picture}[{text}]({url}/{'raw' if picture else 'blob'}/main/{path})"

    return LINK.sub(absolute, (HERE / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    setup(long_description=long_description())
