"""What README.md, docs/ and notebooks/ say: their Python runs, their commands run, their links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm.models._registry as registry

from flopeq.cli.app import main
from pipeline.base.config import Experiment
from pipeline.base.yaml_files import parse_yaml, read_yaml

ROOT = Path(__file__).resolve().parent.parent

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# A comment in the line above a block says why it is not run with the others: <!-- not run: ... --> or <!-- slow -->.
BLOCK = re.compile(r"^(?:<!-- (?P<note>.*?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)

LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(path: Path, language: str) -> list[tuple[str, str]]:
    """(note, code) of the fenced blocks in that language."""
    found = BLOCK.finditer(path.read_text(encoding="utf-8"))
    return [(match["note"] or "", match["code"]) for match in found if match["language"] == language]


def python(path: Path) -> list[str]:
    """The page's blocks of Python that run."""
    return [code for note, code in blocks(path, "python") if not note.startswith("not run")]


def commands(slow: bool) -> list[Any]:
    """Every `$ flopeq ...` of the pages' console blocks, once."""
    found = {}
    for path in PAGES:
        for note, code in blocks(path, "console"):
            for line in code.splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["flopeq"] and not note.startswith("not run") and note.startswith("slow") == slow:
                    found[" ".join(words[1:])] = words[1:]
    return [pytest.param(words, id=name) for name, words in found.items()]


@pytest.fixture
def page_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module in which a page's code runs; what it registers in timm is forgotten afterwards."""
    known = set(registry._model_entrypoints)
    module = types.ModuleType("a_page_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    for name in set(registry._model_entrypoints) - known:
        registry._clear_model_entries(name)


@pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")  # timm's
@pytest.mark.parametrize("path", [path for path in PAGES if python(path)], ids=lambda path: path.stem)
def test_python_of_a_page_runs_from_top_to_bottom(path, page_module, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(vars(page_module))
    for code in python(path):
        exec(compile(code, str(path), "exec"), vars(page_module))
    assert vars(page_module).keys() - before - {"__builtins__"}, "nothing of the page was executed"


@pytest.mark.parametrize("words", commands(slow=False))
def test_commands_of_a_page_run(words):
    assert_runs(words)


@pytest.mark.slow
@pytest.mark.parametrize("words", commands(slow=True))
def test_long_commands_of_a_page_run(words):
    """With one image a pass, and not compiled, which other tests are."""
    assert_runs([*words, "--batch-size", "1", "--no-compile"])


def assert_runs(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code


def test_yaml_of_the_study_tutorial_is_an_experiment():
    params = read_yaml(ROOT / "params.yaml")
    recipe = json.dumps(params["recipes"]["digits"])
    fragments = blocks(ROOT / "docs" / "tutorials" / "study.md", "yaml")
    assert fragments
    for _, text in fragments:
        fragment = parse_yaml(f"anchor: &digits {recipe}\n{text}", "study.md")
        merged = {name: value | fragment.get(name, {}) if isinstance(value, dict) else value
                  for name, value in params.items()}  # fmt: skip
        assert Experiment.model_validate(merged).model_dump() != Experiment.model_validate(params).model_dump()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_headings_and_definitions(path):
    for target in LINK.findall(CODE.sub("", path.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        file, _, name = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        if not linked.exists():
            assert made_by_the_site(linked), f"{target}: no such file"
            continue
        if name:
            assert name in names_in(linked), f"{target}: {linked.name} has no {name}"


def made_by_the_site(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs" / "reference")


def names_in(path: Path) -> set[str]:
    """What a link may name in a file: headings of Markdown, definitions of Python."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return set(re.findall(r"^ *(?:async def|def|class) (\w+)", text, re.MULTILINE))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_other_host(tmp_path):
    """Which runs the notebooks."""
    surroundings = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = {str(path.relative_to(tmp_path)): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    for name, text in pages.items():
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="((?:https?:)?//[^"]+)', text)
        assert not loaded, f"{name} loads {loaded}"
        assert "arithmatex" not in text, name
    assert "<math" in pages["maths.html"]
    assert "random_crop_scale" in pages["reference/parameters.html"]
    assert "FlopAttention" in pages["reference/library/layers.html"]
    for path in NOTEBOOKS:
        assert "data:image/png;base64" in pages[f"notebooks/{path.stem}.html"], path
