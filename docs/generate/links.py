"""Links of the documents as they work in a repository browser, turned into links of the site.

A document links to files by their path. What lies in docs/ is a page or a picture of the site; a file anywhere else
gets a page that shows its text, `source/<path>.md`. `tests/test_x.py#test_name` leads to the line that defines it.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCED = re.compile(r"(^ *(`{3,})[^\n]*\n.*?^ *\2 *$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash", ".csv": "text"}


def rewritten(markdown: str, document: str, page: str, complain: Callable[[str], None]) -> str:
    """The text of `document` (a path in the repository) with the links that `page` (a path in the site) needs."""

    def link(match: re.Match[str]) -> str:
        target, _, name = match[2].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(document), target))
        anchor = name
        if name and not path.endswith(".md"):
            line = line_of(path, name)
            anchor = f"__span-0-{line}"
            if line is None:
                complain(f"{document}: {path} defines no {name}")
        relative = posixpath.relpath(page_of(path), posixpath.dirname(page) or ".")
        return f"{match[1]}{relative}{'#' + anchor if anchor else ''}{match[3]}"

    return "".join(part if is_code else _LINK.sub(link, part) for part, is_code in _parts(markdown))


def linked_files(markdown: str, document: str) -> set[str]:
    """Paths of the repository's files to which a document links."""
    found = set()
    for part, is_code in _parts(markdown):
        for match in () if is_code else _LINK.finditer(part):
            target = match[2].partition("#")[0]
            if target and "://" not in target and not target.startswith("mailto:"):
                found.add(posixpath.normpath(posixpath.join(posixpath.dirname(document), target)))
    return found


def page_of(path: str) -> str:
    """Where the site shows a file of the repository."""
    if path == "README.md":
        return "index.md"
    if path.endswith(".ipynb"):
        return path.removesuffix(".ipynb") + ".md"
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    visible = re.sub(r"(^|/)\.", r"\1dot-", path)  # mkdocs leaves out files whose names begin with a dot
    return f"source/{visible}" if path.endswith(".md") else f"source/{visible}.md"


def source_page(path: str) -> str:
    """A page that shows a file: Markdown as it is, anything else as code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    name = posixpath.basename(path)
    language = _LANGUAGES.get(Path(path).suffix) or {"Makefile": "make", "Dockerfile": "docker"}.get(name, "text")
    fence = "`" * 8
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def line_of(path: str, name: str) -> int | None:
    """The line of a Python file that defines a function or a class of that name; None: there is none."""
    definition = re.compile(rf"\s*(async def|def|class) {re.escape(name)}\b")
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if definition.match(line)), None)


def _parts(markdown: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces: (piece, whether it is a fenced block of code)."""
    position = 0
    for match in _FENCED.finditer(markdown):
        yield markdown[position : match.start()], False
        yield match[0], True
        position = match.end()
    yield markdown[position:], False
