"""Runs the trials of a sweep on Ray Tune, in rounds, as many at once as the cluster holds.

A plan is a generator that yields rounds of trials and receives their outcomes, all of a round at once and in the order
of the round. The result therefore does not depend on which trial ends first, on the number of machines, or on
interruptions of the sweep.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from pipeline import cluster
from pipeline.base import locks
from pipeline.base.schema import AshaParams
from pipeline.sweeps import trial
from pipeline.sweeps.reporter import SweepReporter
from pipeline.sweeps.trial import TrialDirectory, TrialGroup, TrialOutcome, TrialSpec
from pipeline.training import report_log

logger = logging.getLogger(__name__)

TrialPlan = Generator[list[TrialSpec], list[TrialOutcome], None]

OutcomeCallback = Callable[[TrialOutcome], Mapping[str, float | None]]
"""Called with a trial that has ended. Returns further metrics for its MLflow run."""

# For a trial that only waits for its workers: if it held a core, its workers could lack it and never start.
_DRIVER_RESOURCES: dict[str, int | float] = {"CPU": 0, "node:__internal_head__": 0.001}

TUNE_ENV = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # one pending trial beside the running ones
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Tune's own state is not used: see pipeline/sweeps/trial.py
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run_sweep(
    sweep: TrialGroup,
    plans: Mapping[str, TrialPlan],
    *,
    planned: Sequence[tuple[int, TrialSpec]],
    asha: AshaParams | None = None,
    on_outcome: OutcomeCallback = lambda outcome: {},
) -> tuple[dict[str, list[TrialOutcome]], SweepReporter]:
    """Trains the trials of the plans. Returns each plan's outcomes, in the order of its trials, and the open reporter.

    Args:
        planned: maximum numbers of trials, each with a sample of these trials, for the progress display.
        asha: when to stop trials early; None: never.
        on_outcome: called with every trial that has ended, also in an earlier process.
    Raises: before anything starts, ClusterError if the cluster is too small for a trial, and BusyError if another
        process runs this sweep.
    """
    workers = sweep.settings.workers
    settings = sweep.experiment.train.model_copy(update={"cpus_per_worker": sweep.settings.cpus_per_worker})
    cluster.connect(cpus=sweep.settings.cpus(settings))
    gpu = ray.cluster_resources().get("GPU", 0) > 0 if settings.gpu == "auto" else settings.gpu
    worker_resources = trial.worker_resources(settings, gpu)
    num_concurrent = max_concurrent_trials(workers, worker_resources)
    trials_dir = sweep.trials_dir
    storage = sweep.experiment.storage
    shared_config = {
        "root": str(Path.cwd()),
        "trials_dir": str(trials_dir),
        "gpu": gpu,
        "storage": f"{storage}/sweeps/{sweep.name}" if "://" in storage else str(trials_dir),
    }
    reporter = SweepReporter(sweep, planned, num_concurrent)
    searcher = PlanSearcher(plans, shared_config, reporter, trials_dir, on_outcome)
    trial_resources = worker_resources if workers == 1 else _DRIVER_RESOURCES
    os.environ.update({**TUNE_ENV, **os.environ})
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it warns about files that we do not use
    lock = locks.hold_lock(trials_dir / "lock", f"{sweep.title} in {Path.cwd()}")
    (trials_dir / f"{trial.USED_TRIALS}.json").unlink(missing_ok=True)  # until the sweep has ended
    with lock, reporter, tempfile.TemporaryDirectory() as scratch, _sigterm_as_sigint():
        tune.Tuner(
            tune.with_resources(trial.run_trial, tune.PlacementGroupFactory([trial_resources])),
            tune_config=tune.TuneConfig(
                metric=trial.METRIC,
                mode="max",
                search_alg=searcher,
                scheduler=RoundAshaScheduler(asha, searcher),
                num_samples=-1,
                max_concurrent_trials=num_concurrent,
                reuse_actors=workers == 1,
            ),
            run_config=tune.RunConfig(
                name=sweep.name,
                storage_path=scratch,
                verbose=0,
            ),
        ).fit()
        if searcher.has_pending_trials:  # Tune was asked to stop
            raise KeyboardInterrupt
        finished = {outcome.spec.fingerprint for done in searcher.outcomes.values() for outcome in done}
        TrialDirectory(trials_dir).save(trial.USED_TRIALS, {"fingerprints": sorted(finished)})
    return searcher.outcomes, reporter


def max_concurrent_trials(workers: int, worker_resources: Mapping[str, float]) -> int:
    """Returns how many trials, of `workers` workers with `worker_resources` each, fit on the cluster at once.

    Raises: ClusterError if none fits.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    capacity = sum(min(int(node.get(kind, 0) // amount) for kind, amount in worker_resources.items()) for node in nodes)
    if capacity < workers:
        available = {kind: sum(node.get(kind, 0) for node in nodes) for kind in worker_resources}
        raise cluster.ClusterError(
            f"a trial needs {workers} x {_format_resources(worker_resources)}, "
            f"and the Ray cluster has {_format_resources(available)} on {len(nodes)} "
            f"node{'s' if len(nodes) > 1 else ''}: lower the sweep's workers, cpus_per_worker or train.loader_workers"
        )
    return capacity // workers


def _format_resources(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for kind, amount in amounts.items())


class PlanSearcher(Searcher):
    """Passes the plans' trials to Tune and their outcomes to the plans. Identical trials run once."""

    def __init__(
        self,
        plans: Mapping[str, TrialPlan],
        shared_config: Mapping[str, Any],
        reporter: SweepReporter,
        trials_dir: Path,
        on_outcome: OutcomeCallback = lambda outcome: {},
    ) -> None:
        super().__init__(metric=trial.METRIC, mode="max")
        self.outcomes: dict[str, list[TrialOutcome]] = {name: [] for name in plans}
        self._plans, self._shared_config, self._reporter, self._trials_dir = (
            dict(plans),
            shared_config,
            reporter,
            trials_dir,
        )
        self._on_outcome = on_outcome
        self._rounds: dict[str, list[TrialSpec]] = {}
        self._queue: list[TrialSpec] = []
        self._running: dict[str, TrialSpec] = {}  # by Tune's id
        self._finished: dict[str, TrialOutcome] = {}  # by fingerprint
        self._restarts: Counter[str] = Counter()  # by fingerprint
        self._warned_of_eager = False
        self.stopped: set[str] = set()  # Tune's ids of trials that the scheduler has stopped
        for name in plans:
            self._start_round(name, None)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self._queue:
            return None if self._rounds else Searcher.FINISHED
        spec = self._running[trial_id] = self._queue.pop(0)
        self._reporter.on_trial_start(spec)
        return {**self._shared_config, "spec": spec}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if (spec := self._running.get(trial_id)) and "epoch" in result:
            self._reporter.on_trial_result(spec, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if spec := self._running.pop(trial_id, None):
            # Tune's own restarts do not cover a process that dies between two trials.
            if error and self._restarts[spec.fingerprint] < trial.MAX_FAILURES:
                self._restarts[spec.fingerprint] += 1
                self._queue.insert(0, spec)
                return
            folder = TrialDirectory(self._trials_dir / spec.fingerprint)
            saved_outcome = folder.load("outcome")
            if not (saved_outcome or error or trial_id in self.stopped):
                return  # neither finished nor stopped by the scheduler: Tune was asked to stop
            state: trial.State = saved_outcome.get("state", "failed" if error else "stopped")
            message = saved_outcome.get("message")
            if spec.experiment.train.compile and saved_outcome.get("compiled") is False and not self._warned_of_eager:
                self._warned_of_eager = True
                logger.warning(report_log.EAGER_WARNING)
            if error:
                message = folder.load("failure").get("message", "its process died")
            else:
                folder.cleanup()
            rows = tuple(folder.load_history())
            outcome = TrialOutcome(spec, state, rows, _train_seconds(spec, rows), message)
            self._finished[spec.fingerprint] = outcome
            self._reporter.on_trial_complete(outcome, self._on_outcome(outcome))
            self._finish_rounds()

    @property
    def has_pending_trials(self) -> bool:
        """Whether a plan has unfinished trials."""
        return bool(self._rounds)

    def get_trial(self, trial_id: str) -> TrialSpec | None:
        """Returns the running trial with Tune's id, or None."""
        return self._running.get(trial_id)

    def _finish_rounds(self) -> None:
        for name, specs in list(self._rounds.items()):
            if all(spec.fingerprint in self._finished for spec in specs):
                self._start_round(name, [self._outcome(spec) for spec in specs])

    def _outcome(self, spec: TrialSpec) -> TrialOutcome:
        done = self._finished[spec.fingerprint]
        return TrialOutcome(spec, done.state, done.rows, done.seconds, done.message)

    def _start_round(self, name: str, outcomes: list[TrialOutcome] | None) -> None:
        """Starts the next round of a plan. Rounds whose trials have all finished before are answered immediately."""
        while True:
            self.outcomes[name] += outcomes or []
            try:
                specs = next(self._plans[name]) if outcomes is None else self._plans[name].send(outcomes)
            except StopIteration:
                self._rounds.pop(name, None)
                return
            self._rounds[name] = specs
            known = {*self._finished, *(s.fingerprint for s in [*self._queue, *self._running.values()])}
            new_trials = {spec.fingerprint: spec for spec in reversed(specs) if spec.fingerprint not in known}
            self._queue += [spec for spec in specs if new_trials.get(spec.fingerprint) is spec]
            if not all(spec.fingerprint in self._finished for spec in specs):
                return
            outcomes = [self._outcome(spec) for spec in specs]

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: a restarted sweep finds its trials by their fingerprints."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, as `save`."""

    def __reduce__(self) -> Any:
        return (Searcher, ())  # Tune pickles its state, which nothing reads


class RoundAshaScheduler(FIFOScheduler):
    """ASHA's rule: at each rung, one trial in `reduction_factor` continues.

    A trial is compared with those of its plan's earlier rounds at the same rung, that is after the same number of
    samples. Ray's own ASHA compares with whichever trials have arrived, so its result depends on the order of arrival.
    """

    def __init__(self, asha: AshaParams | None, searcher: PlanSearcher) -> None:
        super().__init__()
        self._asha, self._searcher = asha, searcher
        self._rung_values: dict[tuple[str, int], dict[tuple[int, int], float]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        spec, epoch = self._searcher.get_trial(trial.trial_id), result.get("epoch")
        if spec is None or epoch is None or spec.is_confirmation or not self._is_rung(epoch + 1, spec.epochs):
            return TrialScheduler.CONTINUE
        rung = self._rung_values.setdefault((spec.run_name, epoch), {})
        value = rung[spec.round, spec.index] = result["val/top1_pct"]
        if survives_rung(value, [other for (round, _), other in rung.items() if round < spec.round], self._factor):
            return TrialScheduler.CONTINUE
        self._searcher.stopped.add(trial.trial_id)
        return TrialScheduler.STOP

    @property
    def _factor(self) -> int:
        return self._asha.reduction_factor if self._asha else 1

    def _is_rung(self, done: int, epochs: int) -> bool:
        return self._asha is not None and done < epochs and done in rungs(self._asha, epochs)

    def __reduce__(self) -> Any:
        return (FIFOScheduler, ())


def rungs(asha: AshaParams, epochs: int) -> Iterator[int]:
    """Yields the numbers of epochs after which a trial of `epochs` epochs may be stopped."""
    rung = asha.grace_epochs
    while rung < epochs:
        yield rung
        rung *= asha.reduction_factor


def survives_rung(value: float, others: Sequence[float], factor: int) -> bool:
    """Whether a value is in the best 1/factor of the others. True if there are fewer than `factor` others."""
    if len(others) < factor:
        return True
    return sum(other > value for other in others) < len(others) / factor


def _train_seconds(spec: TrialSpec, rows: Sequence[Mapping[str, float]]) -> float:
    return sum(spec.images_per_epoch / row["perf/img_per_s"] for row in rows)


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Handles SIGTERM as Ctrl-C, so that Tune ends its trials and frees their resources."""

    def interrupt(signum: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
