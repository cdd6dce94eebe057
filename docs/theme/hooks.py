"""What the site has beyond the files in docs/: the reference, pages of the repository's root, links out of docs/."""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

import reference
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
_FROM_ROOT = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_COMMANDS = "reference/commands/"
_LOG = logging.getLogger("mkdocs.hooks.longext")
_HREF = re.compile(r'(?<=<a href=")(?!\w+:|#|/)([^"#]+\.(?:md|ipynb))(?=[#"])')
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_config(config: Any) -> Any:
    """List every command in the navigation, where mkdocs.yml has `reference/commands/`."""
    commands = [{name: reference.path_of(name)} for name, _ in reference.commands()]
    config.nav = _filled(config.nav, [f"{_COMMANDS}index.md", *commands])
    return config


def _filled(items: list[Any], commands: list[dict[str, str]]) -> list[Any]:
    filled = []
    for item in items:
        (title, value), *_ = item.items() if isinstance(item, dict) else {"": item}.items()
        if value == _COMMANDS:
            filled.append({title: commands})
        elif isinstance(value, list):
            filled.append({title: _filled(value, commands)})
        else:
            filled.append(item)
    return filled


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are written from the program, and those that lie in the repository's root."""
    for path, text in reference.pages().items():
        files.append(File.generated(config, path, content=text))
    for source, path in _FROM_ROOT.items():
        files.append(File.generated(config, path, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let links that leave the site point into the repository, where they work on GitHub as well."""
    roots = {path: source for source, path in _FROM_ROOT.items()}
    source = roots.get(page.file.src_uri) or f"docs/{page.file.src_uri}"

    def rewrite(match: re.Match[str]) -> str:
        anchor = match[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        inside = _FROM_ROOT.get(path) or path.removeprefix("docs/")
        file = files.get_file_from_path(inside)
        if (file is not None and file.inclusion.is_included()) or not (ROOT / path).exists():
            return posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".") + anchor
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{config.repo_url.rstrip('/')}/{kind}/main/{path}{anchor}"

    return _LINK.sub(rewrite, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Let the links of notebooks lead to pages, as mkdocs does for Markdown; warn of those that lead nowhere."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html

    def rewrite(match: re.Match[str]) -> str:
        path = posixpath.join(posixpath.dirname(page.file.src_uri), match[1])
        file = files.get_file_from_path(posixpath.normpath(path))
        if file is None:
            _LOG.warning("%s has a link to %s, which is no page.", page.file.src_uri, match[1])
            return match[1]
        return file.url_relative_to(page.file)

    return _HREF.sub(rewrite, html)
