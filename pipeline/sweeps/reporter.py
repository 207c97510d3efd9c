"""Reports a running sweep to the terminal and to MLflow: trials by state, the best so far, the time left."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pipeline import track
from pipeline.sweeps.trial import METRIC, TRIAL_STATES, TrialDirectory, TrialGroup, TrialOutcome, TrialSpec

logger = logging.getLogger(__name__)

_FLUSH_S = 10.0  # interval between a running trial's updates in MLflow


class SweepReporter:
    """Reports the progress of a sweep. A resumed sweep continues its MLflow run."""

    def __init__(self, sweep: TrialGroup, planned: Sequence[tuple[int, TrialSpec]], num_concurrent: int) -> None:
        self._sweep, self._num_concurrent = sweep, num_concurrent
        self._num_trials = sum(count for count, _ in planned)
        self._remaining_cost = sum(count * spec.epochs * spec.cost_per_epoch for count, spec in planned)
        self._states: Counter[str] = Counter()
        self._best: dict[str, tuple[float, str]] = {}
        self._started_at: dict[str, float] = {}  # trial's name -> start time
        self._trained_cost, self._trained_s = 0.0, 0.0  # of the trials that have ended
        self._runs: dict[str, str] = {}  # fingerprint -> MLflow run
        self._pending: dict[str, list[dict[str, Any]]] = {}
        self._flushed: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> SweepReporter:
        saved = self._sweep_directory.load("sweep")
        resume = saved.get("mlflow_run_id") if saved.get("status") == "running" else None
        self.mlflow_run_id = track.start_sweep(
            self._sweep.experiment, self._sweep.title, self._sweep.settings, resume=resume
        )
        self._sweep_directory.save("sweep", {"mlflow_run_id": self.mlflow_run_id, "status": "running"})
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
                track.end_run(self._runs[fingerprint], "interrupted")
            track.end_run(self.mlflow_run_id, "interrupted")

    def on_trial_start(self, spec: TrialSpec) -> None:
        """A trial starts or resumes."""
        self._started_at[spec.name] = time.monotonic()
        folder = self._trial_directory(spec)
        saved = folder.load("mlflow")
        resume = saved.get("mlflow_run_id") if saved.get("sweep") == self.mlflow_run_id else None
        run_id = track.start_trial(
            self._sweep.experiment,
            self.mlflow_run_id,
            spec.name,
            {
                **spec.params,
                "run": spec.run_name,
                "seed": spec.seed,
                "model": spec.experiment.run(spec.run_name).model,
                "fingerprint": spec.fingerprint,
            },
            resume=resume,
        )
        self._runs[spec.fingerprint] = run_id
        folder.save("mlflow", {"mlflow_run_id": run_id, "sweep": self.mlflow_run_id})
        self._pending[spec.fingerprint], self._flushed[spec.fingerprint] = [], time.monotonic()

    def on_trial_result(self, spec: TrialSpec, row: dict[str, Any]) -> None:
        """A trial finished an epoch."""
        self._pending[spec.fingerprint].append(row)
        if not spec.is_confirmation:
            self._update_best(spec, row[METRIC])
        if time.monotonic() - self._flushed[spec.fingerprint] > _FLUSH_S:
            self._flush(spec)

    def on_trial_complete(self, outcome: TrialOutcome, metrics: Mapping[str, float | None]) -> None:
        """A trial ended. Its MLflow run gets these metrics, too."""
        spec = outcome.spec
        self._states[outcome.state] += 1
        elapsed_s = time.monotonic() - self._started_at.pop(spec.name)
        if elapsed_s > outcome.seconds / 2:  # otherwise, an earlier sweep trained it
            self._trained_s += elapsed_s
            self._trained_cost += len(outcome.rows) * spec.cost_per_epoch
        self._remaining_cost -= spec.epochs * spec.cost_per_epoch
        self._flush(spec)
        run_id = self._runs[spec.fingerprint]
        del self._pending[spec.fingerprint]
        track.log_results(run_id, {"best/top1_pct": outcome.top1_pct, "cost/train_s": outcome.seconds, **metrics})
        track.end_run(run_id, outcome.state)
        if not self._live:
            top1 = "no epoch" if outcome.top1_pct is None else f"top-1 {outcome.top1_pct:.2f} %"
            logger.info("%s %s  %s  %s", spec.name, outcome.state, top1, self._summary())
        if outcome.message:
            logger.warning("%s %s: %s", spec.name, outcome.state, outcome.message)

    def finish(self, numbers: dict[str, float | None], artifacts: list[Path]) -> None:
        """Logs the numbers and files of the finished sweep, and its number of trials by state."""
        states = {f"trials/{state}": float(self._states[state]) for state in TRIAL_STATES}
        track.log_results(self.mlflow_run_id, {**states, **numbers}, artifacts)
        track.end_run(self.mlflow_run_id, "finished")
        self._sweep_directory.save("sweep", {"mlflow_run_id": self.mlflow_run_id, "status": "finished"})

    @property
    def _sweep_directory(self) -> TrialDirectory:
        return TrialDirectory(self._sweep.trials_dir)

    def _trial_directory(self, spec: TrialSpec) -> TrialDirectory:
        return TrialDirectory(self._sweep.trials_dir / spec.fingerprint)

    def _flush(self, spec: TrialSpec) -> None:
        rows, self._pending[spec.fingerprint] = self._pending[spec.fingerprint], []
        if rows:
            track.log_epochs(self._runs[spec.fingerprint], rows)
        self._flushed[spec.fingerprint] = time.monotonic()

    def _update_best(self, spec: TrialSpec, top1_pct: float) -> None:
        self._best[spec.run_name] = max(self._best.get(spec.run_name, (top1_pct, spec.name)), (top1_pct, spec.name))

    def _eta_s(self) -> float | None:
        if not self._trained_cost:
            return None
        return self._trained_s / self._trained_cost * self._remaining_cost / self._num_concurrent

    def _summary(self) -> str:
        eta_s = self._eta_s()
        states = ", ".join(f"{count} {state}" for state, count in self._states.items())
        return (
            f"[{states} of at most {self._num_trials}{'' if eta_s is None else f'; at most about {eta_s:.0f} s left'}]"
        )

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        eta_s = self._eta_s()
        counts = [f"{self._states[state]} {state}" for state in TRIAL_STATES if self._states[state]]
        table.add_row(
            self._sweep.title,
            ", ".join([f"{len(self._started_at)} running", *counts]),
            f"of at most {self._num_trials}",
            "" if eta_s is None else f"at most about {eta_s:.0f} s left",
        )
        for run_name, (top1_pct, name) in self._best.items():
            table.add_row("", run_name, f"best {top1_pct:.2f} %", name)
        return table
