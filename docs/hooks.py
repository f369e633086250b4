"""Bring the Markdown files outside `docs/` into the site, at the paths that they have in the repository.

Links are written for the repository, where people read them first. A page under `docs/` loses that folder in the site,
so links between pages are worked out anew; files that are no pages (configurations, scripts, figures) come along where
a page links to them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("README_zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "deploy/README.md")
PATTERNS = ("recipes/*/README.md", "src/polar/checkpoints/*/README.md")
LINK = re.compile(r"\[([^\]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add pages and what they link to."""
    _add(files, config, "README.md")
    found = [*PAGES, *(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in sorted(ROOT.glob(pattern)))]
    for name in found:
        _add(files, config, name)
    for page in list(files.documentation_pages()):
        for link in LINK.finditer(page.content_string):
            target = _target(_source(page.src_uri), link.group(2))
            if (ROOT / target).is_file():
                _add(files, config, target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links of the repository to the pages of the site."""
    own = page.file.src_uri

    def replaced(link: re.Match[str]) -> str:
        text, path, anchor = link.groups()
        target = _target(_source(own), path)
        if (ROOT / target).is_dir():  # the site has no lists of files
            return text
        if files.get_file_from_path(_place(target)) is None:
            raise PluginError(f"{own}: link to {path}, which is not a file of the repository")
        return f"[{text}]({posixpath.relpath(_place(target), posixpath.dirname(own) or '.')}{anchor or ''})"

    return LINK.sub(replaced, markdown)


def _add(files: Files, config: Any, name: str) -> None:
    if files.get_file_from_path(_place(name)) is None:
        files.append(File.generated(config, _place(name), abs_src_path=str(ROOT / name)))


def _place(name: str) -> str:
    """Where a file of the repository is in the site."""
    return "index.md" if name == "README.md" else name.removeprefix("docs/")


def _source(place: str) -> str:
    """The inverse of `_place`."""
    if place == "index.md":
        return "README.md"
    return f"docs/{place}" if (ROOT / "docs" / place).exists() else place


def _target(source: str, link: str) -> str:
    """The file of the repository that a link means; a folder means its README if it has one."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return f"{target}/README.md" if (ROOT / target / "README.md").is_file() else target
