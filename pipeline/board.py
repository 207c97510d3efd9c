"""What people and MLflow see of a sweep while it runs: trials by state, the best so far, the time left."""

from __future__ import annotations

import logging
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline import track
from pipeline.trial import METRIC, STATES, Folder, Outcome, Spec

if TYPE_CHECKING:
    from pipeline.sweep import Stage

logger = logging.getLogger(__name__)

_FLUSH_S = 10.0  # how often a trial's curve is sent to MLflow while it trains


class Board:
    """Follows a sweep. The MLflow run of an interrupted one is gone on with."""

    def __init__(self, stage: Stage, trials: int, at_once: int) -> None:
        self._stage, self._trials, self._at_once = stage, trials, at_once
        self._states: Counter[str] = Counter()
        self._best: dict[str, tuple[float, str]] = {}
        self._begun: dict[str, float] = {}  # trial's name -> when
        self._durations: list[float] = []
        self._runs: dict[str, str] = {}  # fingerprint -> MLflow run
        self._pending: dict[str, list[dict[str, Any]]] = {}
        self._flushed: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> Board:
        note = self._note.note("sweep")
        resume = note.get("mlflow_run_id") if note.get("status") == "running" else None
        self.mlflow_run_id = track.start_sweep(self._stage.experiment, self._stage.name, resume=resume)
        self._note.write("sweep", {"mlflow_run_id": self.mlflow_run_id, "status": "running"})
        console = Console(stderr=True)
        if console.is_terminal:
            self._live = Live(get_renderable=self._table, console=console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
        if kind is not None:
            for fingerprint in self._pending:
                track.finish(self._runs[fingerprint], "interrupted")
            track.finish(self.mlflow_run_id, "interrupted")

    def started(self, spec: Spec) -> None:
        """A trial begins, or one that was interrupted goes on."""
        self._begun[spec.name] = time.monotonic()
        folder = self._folder(spec)
        note = folder.note("mlflow")
        resume = note.get("mlflow_run_id") if note.get("sweep") == self.mlflow_run_id else None
        run_id = track.start_trial(
            self._stage.experiment, self.mlflow_run_id, spec.name,
            {**spec.params, "run": spec.plan, "seed": spec.seed, "model": spec.experiment.run(spec.plan).model,
             "fingerprint": spec.fingerprint},
            resume=resume,
        )
        self._runs[spec.fingerprint] = run_id
        folder.write("mlflow", {"mlflow_run_id": run_id, "sweep": self.mlflow_run_id})
        self._pending[spec.fingerprint], self._flushed[spec.fingerprint] = [], time.monotonic()

    def epoch(self, spec: Spec, row: dict[str, Any]) -> None:
        """An epoch of a trial has ended."""
        self._pending[spec.fingerprint].append(row)
        self._judge(spec, row[METRIC])
        if time.monotonic() - self._flushed[spec.fingerprint] > _FLUSH_S:
            self._flush(spec)

    def ended(self, outcome: Outcome) -> None:
        """A trial has ended."""
        spec = outcome.spec
        self._states[outcome.state] += 1
        self._durations.append(time.monotonic() - self._begun.pop(spec.name))
        self._flush(spec)
        run_id = self._runs[spec.fingerprint]
        del self._pending[spec.fingerprint]
        track.log_final(run_id, {"best/top1_pct": outcome.top1_pct, "cost/train_s": outcome.seconds})
        track.finish(run_id, outcome.state)
        if not self._live:
            top1 = "no epoch" if outcome.top1_pct is None else f"top-1 {outcome.top1_pct:.2f} %"
            logger.info("%s %s  %s  %s", spec.name, outcome.state, top1, self._summary())
        if outcome.message:
            logger.warning("%s %s: %s", spec.name, outcome.state, outcome.message)

    def close(self, numbers: dict[str, float | None], artifacts: list[Path]) -> None:
        """The sweep has ended: its numbers and files, and how many trials ended in which state."""
        states = {f"trials/{state}": float(self._states[state]) for state in STATES}
        track.log_final(self.mlflow_run_id, {**states, **numbers}, artifacts)
        track.finish(self.mlflow_run_id, "finished")
        self._note.write("sweep", {"mlflow_run_id": self.mlflow_run_id, "status": "finished"})

    @property
    def _note(self) -> Folder:
        return Folder(self._stage.places)

    def _folder(self, spec: Spec) -> Folder:
        return Folder(self._stage.places / spec.fingerprint)

    def _flush(self, spec: Spec) -> None:
        rows, self._pending[spec.fingerprint] = self._pending[spec.fingerprint], []
        if rows:
            track.log_epochs(self._runs[spec.fingerprint], rows)
        self._flushed[spec.fingerprint] = time.monotonic()

    def _judge(self, spec: Spec, top1_pct: float) -> None:
        self._best[spec.plan] = max(self._best.get(spec.plan, (top1_pct, spec.name)), (top1_pct, spec.name))

    def _left_s(self) -> float | None:
        if not self._durations:
            return None
        mean = sum(self._durations) / len(self._durations)
        return mean * (self._trials - sum(self._states.values())) / self._at_once

    def _summary(self) -> str:
        left = self._left_s()
        states = ", ".join(f"{count} {state}" for state, count in self._states.items())
        return f"[{states} of at most {self._trials}{'' if left is None else f'; about {left:.0f} s left'}]"

    def _table(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        left = self._left_s()
        counts = [f"{self._states[state]} {state}" for state in STATES if self._states[state]]
        grid.add_row(f"sweep_{self._stage.name}", ", ".join([f"{len(self._begun)} running", *counts]),
                     f"of at most {self._trials}", "" if left is None else f"about {left:.0f} s left")
        for plan, (top1_pct, name) in self._best.items():
            grid.add_row("", plan, f"best {top1_pct:.2f} %", name)
        return grid
