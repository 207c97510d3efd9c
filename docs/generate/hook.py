"""mkdocs' hook: pages that are made from README.md, from code and from notebooks, links between them, and MathML."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

import commands
import latex2mathml.converter
import notebook_pages
import parameters
from links import ROOT, linked_files, page_of, rewritten, source_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.plugins.flopeq")

_shown: dict[str, str] = {}
"""Pages that show a Markdown file from outside docs/ -> that file."""

LIBRARY = "reference/library"
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_DISPLAY = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """A page of each module of the library, after the page that lists them."""
    pages = [{f"flopeq.{name}": f"{LIBRARY}/{name}.md"} for name in _modules()]
    for entry in config.nav or []:
        for section in entry.values():
            for inner in section if isinstance(section, list) else []:
                if list(inner.values()) == [[f"{LIBRARY}.md"]]:
                    next(iter(inner.values())).extend(pages)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are made, and a page for every file outside docs/ that a page links to."""
    made = {"index.md": (ROOT / "README.md").read_text(encoding="utf-8"),
            "reference/parameters.md": parameters.page(),
            "reference/commands.md": commands.page(),
            f"{LIBRARY}.md": _library()}  # fmt: skip
    made |= {f"{LIBRARY}/{name}.md": f"# flopeq.{name}\n\n::: flopeq.{name}\n" for name in _modules()}
    for path in sorted(notebook_pages.FOLDER.glob("*.ipynb")):
        made[page_of(f"notebooks/{path.name}")] = notebook_pages.page(path, path.read_text(encoding="utf-8"))
    texts = {_document(file.src_uri): file.content_string for file in files.documentation_pages()}
    texts |= {_document(page): text for page, text in made.items()}
    _shown.clear()
    while texts:
        document, text = texts.popitem()
        for path in linked_files(text, document):
            page = page_of(path)
            if page.startswith("source/") and page not in made and (ROOT / path).is_file():
                made[page] = source_page(path)
                if path.endswith(".md"):
                    texts[path] = made[page]
                    _shown[page] = path
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to files of the repository become links of the site."""
    where = page.file.src_uri
    if where.startswith("source/") and where not in _shown:
        return markdown  # code
    return rewritten(markdown, _document(where), where, log.warning)


def on_page_content(content: str, page: Page, **_: Any) -> str:
    """Formulas become MathML, which browsers draw themselves; lines of code are places that links may name."""
    if page.present_anchor_ids is not None:
        page.present_anchor_ids |= set(re.findall(r'id="(__span-[\d-]+)"', content))

    def formula(display: str) -> Any:
        return lambda match: latex2mathml.converter.convert(html.unescape(match[1]).strip(), display=display)

    return _DISPLAY.sub(formula("block"), _INLINE.sub(formula("inline"), content))


def _document(page: str) -> str:
    """The document that a page of the site shows; pages that are made read as if they lay in docs/."""
    if page == "index.md":
        return "README.md"
    return _shown.get(page) or f"docs/{page}"


def _modules() -> list[str]:
    """Names below `flopeq.`: modules, and the packages whose `__init__` re-exports what is in them."""
    library = ROOT / "flopeq"
    names = {path.relative_to(library).with_suffix("") for path in library.rglob("*.py")}
    shown = {".".join(name.parts) for name in names if not name.name.startswith("_")}
    below = {name for name in shown if not name.startswith(("layers.", "cli."))}
    return sorted(below | {"layers", "layers.group", "cli"})


def _library() -> str:
    """The list of the library's modules, each with the first line of its docstring."""
    rows = []
    for name in _modules():
        path = ROOT / "flopeq" / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        first = path.read_text(encoding="utf-8").splitlines()[0].strip('"')
        rows.append(f"| [flopeq.{name}](library/{name}.md) | {first} |\n")
    return "# Modules\n\n| module | |\n| --- | --- |\n" + "".join(rows)
