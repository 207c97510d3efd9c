"""The rooms: no cycle between files, no file that is too long, and a docstring for every room."""

from __future__ import annotations

import ast

import grimp
import pytest

PACKAGES = ("flopeq", "pipeline", "stages")
MAX_LINES = 400


def cycles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules that import one another, directly or not."""
    reached = {module: set(targets) for module, targets in imports.items()}
    for through in imports:
        for module, found in reached.items():
            if through in found:
                reached[module] = found | reached[through]
    groups = {frozenset(m for m in reached if m in reached[n] and n in reached[m]) for n in reached if n in reached[n]}
    return [set(group) for group in groups]


def test_files_import_one_another_in_one_direction():
    graph = grimp.build_graph(*PACKAGES)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    assert len(imports) > 100
    assert cycles(imports) == []


def test_a_cycle_through_a_third_file_is_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [{"a", "b", "c"}]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("folder", [*PACKAGES, "tests", "benchmarks"])
def test_files_are_short(root, folder):
    files = sorted((root / folder).rglob("*.py"))
    assert files
    assert [str(file) for file in files if len(file.read_text().splitlines()) > MAX_LINES] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_say_what_they_are_for(root, package):
    files = sorted((root / package).rglob("*.py"))
    rooms = [file for file in files if file.name == "__init__.py"]
    assert [str(room) for room in rooms if not ast.get_docstring(ast.parse(room.read_text()))] == []
