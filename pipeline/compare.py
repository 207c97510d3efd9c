"""Two states of the experiment side by side: revisions, experiments of DVC's, copies of the folder, the workspace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.render import render
from pipeline.table import NOTHING, Cell, Row, Table, Words, error, fixed

METRICS = "reports/metrics.json"
PARAMS = "params.yaml"
_HEADINGS: dict[str, tuple[str, Words]] = {
    "val/top1_pct": ("top-1 %", fixed(1)),
    "val/flop_agreement_pct": ("flop agreement %", fixed(1)),
    "complexity/params_m": ("params (M)", "{:.3g}".format),
    "complexity/gflops": ("GFLOPs", "{:.3g}".format),
    "perf/forward_img_per_s": ("images/s", fixed(0)),
    "perf/throughput_ratio": ("throughput ratio", fixed(2)),
}
"""What the page has columns for. The list of differences has all."""


class CompareError(ValueError):
    """There is nothing to compare with; the message says what to do."""


@dataclass(frozen=True)
class State:
    """What one side of a comparison knows."""

    name: str
    metrics: Mapping[str, Mapping[str, float | bool]]
    """The numbers of metrics.json by run."""
    params: Mapping[str, Any]
    """params.yaml."""


@dataclass(frozen=True)
class Difference:
    """A number or a setting that is not the same on both sides; None: it is not there."""

    of: str
    """A run, or nothing for a setting."""
    name: str
    then: Any
    now: Any

    @property
    def change(self) -> float | None:
        known = [side for side in (self.then, self.now) if isinstance(side, int | float) and not isinstance(side, bool)]
        return known[1] - known[0] if len(known) == 2 else None


def read(where: str | None) -> State:
    """The state at a revision or in a folder; None: in the workspace.

    Raises: CompareError for an unknown revision, or one without metrics.
    """
    place = Path(where or ".")
    if place.is_dir():
        found = place / METRICS
        if not found.is_file():
            raise CompareError(f"{found} not found: `make repro` writes it")
        params = (place / PARAMS).read_text() if (place / PARAMS).is_file() else ""
        return _state(place.resolve().name if where else "now", found.read_text(), params)
    assert where is not None
    return _state(where, _at(where, METRICS), _at(where, PARAMS))


def differences(then: State, now: State) -> list[Difference]:
    """Settings first, then the numbers of each run; those that are equal are left out."""
    found = _settings(then.params, now.params)
    for run in _runs(then, now):
        if run not in then.metrics or run not in now.metrics:
            found.append(Difference(run, "the run", then.metrics.get(run), now.metrics.get(run)))
            continue
        before, after = then.metrics[run], now.metrics[run]
        found += [Difference(run, name, before.get(name), after.get(name)) for name in dict.fromkeys((*before, *after))]
    return [difference for difference in found if difference.then != difference.now]


def tabulate(then: State, now: State) -> Table:
    """A row for each run on either side; for each metric that is known, both sides and the change."""
    known = {key for side in (then, now) for numbers in side.metrics.values() for key in numbers}
    keys = [key for key in _HEADINGS if key in known]
    rows = []
    for run in _runs(then, now):
        cells = [Cell(run, run)]
        for key in keys:
            words = _HEADINGS[key][1]
            both = [side.metrics.get(run, {}).get(key) for side in (then, now)]
            change = Difference(run, key, *both).change
            cells += [_cell(value, words) for value in both]
            cells.append(Cell(NOTHING) if change is None else Cell(signed(change, words), change))
        rows.append(Row(run, tuple(cells)))
    return Table(
        groups=(("", 1), *((_HEADINGS[key][0], 3) for key in keys)),
        columns=("run", *(name for _ in keys for name in (then.name, now.name, "change"))),
        rows=tuple(rows),
        num_text_columns=1,
    )


def write(then: State, now: State, reports: Path = Path("reports")) -> Path:
    """Writes comparison.html and returns its path."""
    page = reports / "comparison.html"
    found = differences(then, now)
    listed = [(d.of, d.name, shown(d.then), shown(d.now)) for d in found]
    page.write_text(render(
        "comparison.html",
        title=f"flopeq: {then.name} and {now.name}",
        table=tabulate(then, now),
        columns=(then.name, now.name),
        settings=[row[1:] for row in listed if not row[0]],
        numbers=[row for row in listed if row[0]],
    ), encoding="utf-8")
    return page


def shown(value: Any) -> str:
    """A number or a setting in words."""
    if value is None:
        return NOTHING
    if isinstance(value, Mapping):
        return "there"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return error(value) if 0 < abs(value) < 1e-3 else f"{value:,.6g}"


def signed(change: float, words: Words) -> str:
    """A difference, or that there is none."""
    return f"{'+' if change > 0 else '-'}{words(abs(change))}" if change else "="


def _at(revision: str, path: str) -> str:
    """A file's text at a revision: git has it, or DVC's cache."""
    import dvc.api
    from dvc.exceptions import DvcException
    from dvc.scm import RevError

    try:
        return dvc.api.read(path, rev=revision)
    except RevError:
        raise CompareError(f"{revision!r} is no revision, no experiment of DVC's, and no folder; `git log --oneline` "
                           "and `dvc exp show` list what there is") from None
    except (DvcException, FileNotFoundError) as cause:
        raise CompareError(f"{revision} has no {path}: commit dvc.lock after a `make repro`, and keep DVC's cache "
                           f"({type(cause).__name__})") from None


def _state(name: str, metrics: str, params: str) -> State:
    return State(name, json.loads(metrics), yaml.safe_load(params) or {})


def _settings(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """The outermost that differ: of a model that is new, its name."""
    found = []
    for key in dict.fromkeys((*then, *now)):
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += _settings(before, after, f"{prefix}{key}.")
        else:
            found.append(Difference("", f"{prefix}{key}", before, after))
    return found


def _runs(then: State, now: State) -> list[str]:
    return list(dict.fromkeys((*now.metrics, *then.metrics)))


def _cell(value: float | None, words: Words) -> Cell:
    return Cell(NOTHING) if value is None else Cell(words(value), value)
