"""Hooks of MkDocs: the addresses, the pages that are files outside docs/, and the links between files of the repository.

The Markdown files of this repository link to each other as GitHub expects it: relative to their folder. The site shows
README.md, CONTRIBUTING.md and a few other files as pages, and the notebook too. These hooks make the pages. They also turn each
link to a file of the repository into a link to its page, or to the repository's address if the file has no page.
"""

import configparser
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pymdownx.slugs import slugify

logger = logging.getLogger("mkdocs.hooks.site")  # below "mkdocs", so that `--strict` counts its warnings

ROOT = Path(__file__).resolve().parent.parent
# Files of the repository outside docs/, and the pages that show them.
OUTSIDE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
NOTEBOOK, NOTEBOOK_PAGE = "docs/quickstart.ipynb", "quickstart_notebook.md"
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s]+)(?P<after>[^)]*\))")
# What a page may not load: scripts, styles, fonts and pictures of other hosts.
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=["']?(?:https?:)?//"""
)


def addresses() -> dict[str, str]:
    """Return the addresses of the repository ("Source") and of the site ("Documentation") as setup.cfg names them."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = settings["metadata"]["project_urls"].strip().splitlines()
    return {name.strip(): address.strip() for name, _, address in (line.partition("=") for line in lines)}


def on_config(config: Any) -> Any:
    """Set the addresses, and name headings as GitHub does, so that a link to a heading works in both places."""
    found = addresses()
    config.site_url = found["Documentation"]
    config.extra["repository"] = found["Source"]  # not `repo_url`, for which the theme asks GitHub at each visit
    config.nav.append({"Repository": found["Source"]})
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of files outside docs/, and of the notebook."""
    for name, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    cells = json.loads((ROOT / NOTEBOOK).read_text(encoding="utf-8"))["cells"]
    files.append(File.generated(config, NOTEBOOK_PAGE, content=notebook_page(cells)))
    return files


def notebook_page(cells: list[dict[str, Any]]) -> str:
    """Return the Markdown of a notebook: its texts, its code, and the text that the code printed."""
    parts = [f"[Download this notebook.]({Path(NOTEBOOK).name})"]
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            text = output.get("text") or output.get("data", {}).get("text/plain", [])
            parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    title, *others = parts[1:2] + parts[:1] + parts[2:]
    return "\n\n".join([title, *others, ""])


def page_of(path: str) -> str | None:
    """Return the site's page that shows a file of the repository, or None if it has no page."""
    if path == NOTEBOOK:
        return NOTEBOOK_PAGE
    return OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") and (ROOT / path).is_file() else None)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn the links of a page to files of the repository into links that work on the site."""
    shown = page.file.src_uri
    source = {made: name for name, made in OUTSIDE.items()}.get(shown, f"docs/{shown}")
    code = [match.span() for match in FENCE.finditer(markdown)]

    def mended(match: re.Match[str]) -> str:
        if any(start <= match.start() < end for start, end in code):
            return match[0]
        return f"{match['before']}{link_of_site(match['target'], source, shown, config.extra['repository'])}{match['after']}"

    return LINK.sub(mended, markdown)


def link_of_site(target: str, source: str, shown: str, repository: str) -> str:
    """Return the target of a link as a page of the site needs it.

    Args:
        target: as the Markdown file has it.
        source: the Markdown file, relative to the top of the repository.
        shown: the page that shows it, relative to the top of the site's sources.
        repository: the repository's address.
    """
    for form in ("blob", "tree", "raw"):  # an absolute address of a file, as README.md needs it on a package index
        if target.startswith(f"{repository}/{form}/main/"):
            target = "/" + target.removeprefix(f"{repository}/{form}/main/")
    if target.startswith(("http://", "https://", "mailto:", "#")):
        return target
    name, mark, heading = target.partition("#")
    path = name.lstrip("/") if name.startswith("/") else posixpath.normpath(posixpath.join(posixpath.dirname(source), name))
    found = page_of(path)
    if found == shown == NOTEBOOK_PAGE:
        return target
    if found is not None:
        return posixpath.relpath(found, posixpath.dirname(shown) or ".") + mark + heading
    if (ROOT / path).exists():
        return f"{repository}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}{mark}{heading}"
    logger.warning("%s: the link %s leads nowhere", source, target)
    return target


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn of a page that loads something from another host."""
    for match in LOADED.finditer(output):
        logger.warning("%s loads something from another host: %s", page.file.src_uri, match[0])
    return output
