"""Compares two states of the experiment: revisions, DVC experiments, copies of the folder, or the workspace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.base.yaml_files import parse_yaml
from pipeline.reporting.page import render_template
from pipeline.reporting.table import MISSING, Cell, Formatter, Row, Table, fixed_point, format_error, format_range

METRICS = "reports/metrics.json"

PARAMS = "params.yaml"

_HEADINGS: dict[str, tuple[str, Formatter]] = {
    "val/top1_pct": ("top-1 %", fixed_point(1)),
    "val/flop_agreement_pct": ("flop agreement %", fixed_point(1)),
    "complexity/params_m": ("params (M)", "{:.3g}".format),
    "complexity/gflops": ("GFLOPs", "{:.3g}".format),
    "perf/forward_img_per_s": ("images/s", fixed_point(0)),
    "perf/throughput_ratio": ("throughput ratio", fixed_point(2)),
}
"""Columns of the page. The list of differences has all metrics."""


class CompareError(ValueError):
    """A state to compare does not exist. The message says what to do."""


@dataclass(frozen=True)
class Revision:
    """One of the two revisions of a comparison."""

    name: str
    metrics: Mapping[str, Mapping[str, float | bool]]
    """The numbers of metrics.json by run."""
    params: Mapping[str, Any]
    """params.yaml."""


@dataclass(frozen=True)
class Difference:
    """A metric or a setting that differs between the two revisions. None: missing in that revision."""

    run: str
    """The run; empty for a setting."""
    name: str
    before: Any
    after: Any

    @property
    def change(self) -> float | None:
        known = [
            value
            for value in (self.before, self.after)
            if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        return known[1] - known[0] if len(known) == 2 else None


def load_revision(where: str | None) -> Revision:
    """Loads the state at a revision or in a folder; None: the workspace.

    Raises: CompareError for an unknown revision, or one without metrics.
    """
    folder = Path(where or ".")
    if folder.is_dir():
        metrics = folder / METRICS
        if not metrics.is_file():
            raise CompareError(f"{metrics} not found: `make repro` writes it")
        params = (folder / PARAMS).read_text() if (folder / PARAMS).is_file() else ""
        return _parse_revision(folder.resolve().name if where else "now", metrics.read_text(), params)
    assert where is not None
    return _parse_revision(where, _read_at_revision(where, METRICS), _read_at_revision(where, PARAMS))


def find_differences(before: Revision, after: Revision) -> list[Difference]:
    """Returns the settings that differ, then the metrics of each run that differ."""
    differences = _compare_params(before.params, after.params)
    for run in _run_names(before, after):
        if run not in before.metrics or run not in after.metrics:
            differences.append(Difference(run, "the run", before.metrics.get(run), after.metrics.get(run)))
            continue
        old, new = before.metrics[run], after.metrics[run]
        differences += [Difference(run, name, old.get(name), new.get(name)) for name in dict.fromkeys((*old, *new))]
    return [difference for difference in differences if difference.before != difference.after]


def build_comparison_table(before: Revision, after: Revision) -> Table:
    """Builds a table with a row per run and, for each known metric, both sides and the change."""
    known = {key for revision in (before, after) for numbers in revision.metrics.values() for key in numbers}
    keys = [key for key in _HEADINGS if key in known]
    rows = []
    for run in _run_names(before, after):
        cells = [Cell(run, run)]
        for key in keys:
            formatter = _HEADINGS[key][1]
            both = [revision.metrics.get(run, {}).get(key) for revision in (before, after)]
            change = Difference(run, key, *both).change
            cells += [_make_cell(revision.metrics.get(run, {}), key, formatter) for revision in (before, after)]
            cells.append(Cell(MISSING) if change is None else Cell(format_change(change, formatter), change))
        rows.append(Row(run, tuple(cells)))
    return Table(
        groups=(("", 1), *((_HEADINGS[key][0], 3) for key in keys)),
        columns=("run", *(name for _ in keys for name in (before.name, after.name, "change"))),
        rows=tuple(rows),
        num_text_columns=1,
    )


def write_comparison(before: Revision, after: Revision, reports: Path = Path("reports")) -> Path:
    """Writes comparison.html and returns its path."""
    page = reports / "comparison.html"
    differences = find_differences(before, after)
    listed = [(d.run, d.name, format_value(d.before), format_value(d.after)) for d in differences]
    page.write_text(
        render_template(
            "comparison.html",
            title=f"flopeq: {before.name} and {after.name}",
            table=build_comparison_table(before, after),
            columns=(before.name, after.name),
            settings=[row[1:] for row in listed if not row[0]],
            numbers=[row for row in listed if row[0]],
        ),
        encoding="utf-8",
    )
    return page


def format_value(value: Any) -> str:
    """Formats a metric or a setting."""
    if value is None:
        return MISSING
    if isinstance(value, Mapping):
        return "there"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return format_error(value) if 0 < abs(value) < 1e-3 else f"{value:,.6g}"


def format_change(change: float, formatter: Formatter) -> str:
    """Formats a change, or `=` if there is none."""
    return f"{'+' if change > 0 else '-'}{formatter(abs(change))}" if change else "="


def _read_at_revision(revision: str, path: str) -> str:
    """Reads a file at a revision, from git or DVC's cache."""
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc.scm import RevError

    try:
        return dvc.api.read(path, rev=revision)
    except RevError:
        raise CompareError(
            f"{revision!r} is neither a revision, nor a DVC experiment, nor a folder; `git log --oneline` "
            "and `dvc exp show` list them"
        ) from None
    except (DvcException, FileNotFoundError) as cause:
        raise CompareError(
            f"{revision} has no {path}: commit dvc.lock after a `make repro`, and keep DVC's cache "
            f"({type(cause).__name__})"
        ) from None


def _parse_revision(name: str, metrics: str, params: str) -> Revision:
    return Revision(name, json.loads(metrics), parse_yaml(params, f"params.yaml of {name}") or {})


def _compare_params(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Returns the outermost keys that differ: of a new model, only its name."""
    differences = []
    for key in dict.fromkeys((*before, *after)):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            differences += _compare_params(old, new, f"{prefix}{key}.")
        else:
            differences.append(Difference("", f"{prefix}{key}", old, new))
    return differences


def _run_names(before: Revision, after: Revision) -> list[str]:
    return list(dict.fromkeys((*after.metrics, *before.metrics)))


def _make_cell(metrics: Mapping[str, float | bool], key: str, formatter: Formatter) -> Cell:
    """Returns a cell with the metric and, if it has one, its interval."""
    value = metrics.get(key)
    low, high = (metrics.get(key.removesuffix("_pct") + f"_{side}_pct") for side in ("low", "high"))
    spread = "" if low is None or high is None else format_range(low, high, formatter)
    return Cell(MISSING) if value is None else Cell(formatter(value), value, spread)
