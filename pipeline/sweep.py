"""Running the trials of a sweep on Ray Tune: as many at once as the cluster holds, in rounds, to the same end.

A plan is a generator that yields rounds of trials and is sent their outcomes, all of a round at once and in its own
order. Which trial ends first, on how many machines they ran and how often the sweep was interrupted is therefore
nothing that a plan could depend on.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

import flopeq
from flopeq.build import build
from flopeq.flops import complexity
from flopeq.variants import baseline_of
from pipeline import cluster, data, proxy, train, trial
from pipeline import recipe as recipes
from pipeline.board import Board
from pipeline.config import Asha, Experiment, HybridSweep, Recipe, RecipeSweep, Run
from pipeline.plan import STEP_OVER_FORWARD
from pipeline.trial import Folder, Outcome, Spec

logger = logging.getLogger(__name__)

Plan = Generator[list[Spec], list[Outcome], None]
# Of a trial that waits for its workers: a core held here would be missing there, and no trial would ever begin.
_TRIAL_SHARE: dict[str, int | float] = {"CPU": 0, "node:__internal_head__": 0.001}
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # a trial more than run is ready to start, and none besides
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",  # Tune's own memory is not used: see pipeline/trial.py
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


class Stage:
    """A sweep of the experiment while it runs: what its trials are made of, and where they lie."""

    def __init__(self, experiment: Experiment, name: str, settings: RecipeSweep | HybridSweep) -> None:
        self.experiment, self.name, self.settings = experiment, name, settings
        self.shards = data.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)
        self.classes = settings.proxy and settings.proxy.classes
        self.images, self.num_classes = proxy.images(self.shards, self.classes)
        self.places = Path("sweeps/trials", name).absolute()
        self.places.mkdir(parents=True, exist_ok=True)

    def spec(
        self, plan: str, number: int, round: int, seed: int, params: Mapping[str, Any], run: Run, recipe: Recipe,
        *, confirms: bool = False,
    ) -> Spec:
        """A trial of a run and its recipe, at the sweep's number of epochs and on its proxy."""
        experiment, settings = self.experiment, self.settings
        side = settings.proxy and settings.proxy.image_size
        if side:
            run = run.model_copy(update={"args": {**run.args, "img_size": side}})
            experiment = experiment.model_copy(
                update={"data": experiment.data.model_copy(update={"image_size": side})}
            )
        recipe = shortened(recipe, settings.epochs)
        recipes.check(recipe, experiment.data, experiment.train.model_copy(update={"workers": settings.workers}))
        experiment = experiment.model_copy(update={
            "models": {plan: run.model_copy(update={"recipe": "trial", "seed": seed})},
            "recipes": {"trial": recipe},
            "train": experiment.train.model_copy(
                update={"workers": settings.workers, "cpus_per_worker": settings.cpus_per_worker, "keep_checkpoints": 1}
            ),
        })
        described = {**experiment.resolved(plan), "run": "", "classes": self.classes}
        size = recipe.global_batch_size
        return Spec(
            plan, number, round, seed, dict(params), experiment, self.classes,
            images_per_epoch=data.steps_per_epoch(len(self.images["train"]), size) * size,
            fingerprint=train.fingerprint(described, self.shards),
            confirms=confirms,
        )

    def announce(self, trials: int, specs: Sequence[Spec]) -> None:
        """Says what the sweep will cost at most, where a proxy stands in for the data.

        Args:
            specs: some of its trials; the cost is that of the mean one, by the paper's throughput on an A100.
        """
        if self.settings.proxy is None:
            return
        hours = [gpu_hours(spec) for spec in specs]
        known = [hour for hour in hours if hour is not None]
        cost = "unknown, as the paper has no throughput of these models"
        if known:
            cost = f"{trials * sum(known) / len(known):,.1f} GPU-hours of an A100 for arithmetic alone: expect more"
        logger.info(
            "sweep_%s: at most %d trials of %d epochs, %s images of %d classes at %d pixels each; cost: %s", self.name,
            trials, specs[0].epochs, f"{specs[0].images_per_epoch:,}", self.num_classes,
            specs[0].experiment.data.image_size, cost,
        )


def gpu_hours(spec: Spec) -> float | None:
    """A trial's training on one A100 by the forward throughput in the paper's Table 1, which an H has from its X.

    Another resolution or size costs in proportion to its FLOPs. None for a model that is not in the table.
    """
    run = spec.experiment.run(spec.plan)
    name = baseline_of(run.model)
    row = next((row for row in flopeq.table1() if row.model == name and row.throughput_a100_im_s), None)
    if row is None:
        return None
    side = spec.experiment.data.image_size
    flops = complexity(build(run.model, device="meta", num_classes=1000, **run.args), (3, side, side)).flops
    rate = row.throughput_a100_im_s * row.gflops_per_img * 1e9 / flops / STEP_OVER_FORWARD
    return spec.epochs * spec.images_per_epoch / rate / 3600


def shortened(recipe: Recipe, epochs: int | None) -> Recipe:
    """The recipe in so many epochs, with warm-up and cooldown in proportion, if any; None: as it is."""
    if epochs is None:
        return recipe
    spans = {field: getattr(recipe, field) for field in ("warmup_epochs", "cooldown_epochs")}
    shorter = {field: max(1, round(span * epochs / recipe.epochs)) for field, span in spans.items() if span}
    return recipe.model_copy(update={"epochs": epochs, **shorter})


def run(
    stage: Stage, plans: Mapping[str, Plan], *, trials: int, asha: Asha | None = None
) -> tuple[dict[str, list[Outcome]], Board]:
    """Trains what the plans yield. Returns every plan's outcomes, in the order of its trials, and the open board.

    Args:
        trials: how many there will be in all, for people.
        asha: when to stop trials early; None: never.
    Raises: ClusterError, before anything starts, for a trial that the cluster does not hold.
    """
    workers = stage.settings.workers
    settings = stage.experiment.train.model_copy(update={"cpus_per_worker": stage.settings.cpus_per_worker})
    cluster.connect(cpus=stage.settings.cpus(settings))
    gpu = ray.cluster_resources().get("GPU", 0) > 0 if settings.gpu == "auto" else settings.gpu
    each = trial.resources(settings, gpu)
    at_once = concurrency(workers, each)
    places = stage.places
    storage = stage.experiment.storage
    common = {
        "root": str(Path.cwd()), "place": str(places), "gpu": gpu,
        "storage": f"{storage}/sweeps/{stage.name}" if "://" in storage else str(places),
    }
    board = Board(stage, trials, at_once)
    conductor = _Conductor(plans, common, board, places)
    share = each if workers == 1 else _TRIAL_SHARE
    os.environ.update({**_QUIET, **os.environ})
    logging.getLogger("ray.tune").setLevel(logging.ERROR)  # it misses the files that nobody asked it for
    with board, tempfile.TemporaryDirectory() as scratch, _terminated_as_interrupted():
        tune.Tuner(
            tune.with_resources(trial.run, tune.PlacementGroupFactory([share])),
            tune_config=tune.TuneConfig(
                metric=trial.METRIC,
                mode="max",
                search_alg=conductor,
                scheduler=_Rungs(asha, conductor),
                num_samples=-1,
                max_concurrent_trials=at_once,
                reuse_actors=workers == 1,
            ),
            run_config=tune.RunConfig(
                name=stage.name,
                storage_path=scratch,
                verbose=0,
            ),
        ).fit()
        if conductor.is_waiting:  # Tune was asked to stop
            raise KeyboardInterrupt
    _forget(places, {outcome.spec.fingerprint for done in conductor.outcomes.values() for outcome in done})
    return conductor.outcomes, board


def concurrency(workers: int, each: Mapping[str, float]) -> int:
    """Trials of so many workers, each holding so much, that the cluster's nodes have room for at once.

    Raises: ClusterError if it is none.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(min(int(node.get(kind, 0) // amount) for kind, amount in each.items()) for node in nodes)
    if room < workers:
        has = {kind: sum(node.get(kind, 0) for node in nodes) for kind in each}
        raise cluster.ClusterError(
            f"a trial needs {workers} x {_words(each)}, and the Ray cluster has {_words(has)} on {len(nodes)} "
            f"node{'s' if len(nodes) > 1 else ''}: lower the sweep's workers, cpus_per_worker or train.loader_workers"
        )
    return room // workers


def _words(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}{'s' if amount != 1 else ''}" for kind, amount in amounts.items())


class _Conductor(Searcher):
    """Hands the plans' trials to Tune, and their outcomes to the plans. Two trials that are the same are one."""

    def __init__(self, plans: Mapping[str, Plan], common: Mapping[str, Any], board: Board, places: Path) -> None:
        super().__init__(metric=trial.METRIC, mode="max")
        self.outcomes: dict[str, list[Outcome]] = {name: [] for name in plans}
        self._plans, self._common, self._board, self._places = dict(plans), common, board, places
        self._rounds: dict[str, list[Spec]] = {}
        self._queue: list[Spec] = []
        self._running: dict[str, Spec] = {}  # by Tune's id
        self._done: dict[str, Outcome] = {}  # by fingerprint
        self._restarts: Counter[str] = Counter()  # by fingerprint
        self.stopped: set[str] = set()  # Tune's ids of trials that the scheduler has stopped
        for name in plans:
            self._advance(name, None)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if not self._queue:
            return None if self._rounds else Searcher.FINISHED
        spec = self._running[trial_id] = self._queue.pop(0)
        self._board.started(spec)
        return {**self._common, "spec": spec}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if (spec := self._running.get(trial_id)) and "epoch" in result:
            self._board.epoch(spec, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if spec := self._running.pop(trial_id, None):
            # Tune's own restarts do not cover a process that dies while it changes from one trial to the next.
            if error and self._restarts[spec.fingerprint] < trial.RUN_FAILURES:
                self._restarts[spec.fingerprint] += 1
                self._queue.insert(0, spec)
                return
            folder = Folder(self._places / spec.fingerprint)
            found = folder.note("outcome")
            if not (found or error or trial_id in self.stopped):
                return  # neither ended nor told to: Tune was asked to stop
            state: trial.State = found.get("state", "failed" if error else "stopped")
            message = found.get("message")
            if error:
                message = folder.note("failure").get("message", "its process died")
            else:
                folder.tidy()
            rows = tuple(folder.rows())
            outcome = Outcome(spec, state, rows, _seconds(spec, rows), message)
            self._done[spec.fingerprint] = outcome
            self._board.ended(outcome)
            self._close_rounds()

    @property
    def is_waiting(self) -> bool:
        """Whether a plan has trials that have not ended."""
        return bool(self._rounds)

    def spec(self, trial_id: str) -> Spec | None:
        """What Tune's trial of that id trains."""
        return self._running.get(trial_id)

    def _close_rounds(self) -> None:
        for name, specs in list(self._rounds.items()):
            if all(spec.fingerprint in self._done for spec in specs):
                self._advance(name, [self._outcome(spec) for spec in specs])

    def _outcome(self, spec: Spec) -> Outcome:
        done = self._done[spec.fingerprint]
        return Outcome(spec, done.state, done.rows, done.seconds, done.message)

    def _advance(self, name: str, outcomes: list[Outcome] | None) -> None:
        """The next round of a plan; one whose trials have all been seen before is answered at once."""
        while True:
            self.outcomes[name] += outcomes or []
            try:
                specs = next(self._plans[name]) if outcomes is None else self._plans[name].send(outcomes)
            except StopIteration:
                self._rounds.pop(name, None)
                return
            self._rounds[name] = specs
            known = {*self._done, *(s.fingerprint for s in [*self._queue, *self._running.values()])}
            fresh = {spec.fingerprint: spec for spec in reversed(specs) if spec.fingerprint not in known}
            self._queue += [spec for spec in specs if fresh.get(spec.fingerprint) is spec]
            if not all(spec.fingerprint in self._done for spec in specs):
                return
            outcomes = [self._outcome(spec) for spec in specs]

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep that is run again finds its trials by their fingerprints."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""

    def __reduce__(self) -> Any:
        return (Searcher, ())  # Tune writes itself down; nobody reads it


class _Rungs(FIFOScheduler):
    """ASHA's rule: at each rung, so many epochs, one in `reduction_factor` goes on.

    A trial is compared with those of its plan's earlier rounds at the same rung, that is at the same number of samples
    seen. Ray's own ASHA compares with whatever has come by, so that the order of arrival decides.
    """

    def __init__(self, asha: Asha | None, conductor: _Conductor) -> None:
        super().__init__()
        self._asha, self._conductor = asha, conductor
        self._reached: dict[tuple[str, int], dict[tuple[int, int], float]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        spec, epoch = self._conductor.spec(trial.trial_id), result.get("epoch")
        if spec is None or epoch is None or spec.confirms or not self._is_rung(epoch + 1, spec.epochs):
            return TrialScheduler.CONTINUE
        rung = self._reached.setdefault((spec.plan, epoch), {})
        value = rung[spec.round, spec.number] = result["val/top1_pct"]
        if keeps(value, [other for (round, _), other in rung.items() if round < spec.round], self._factor):
            return TrialScheduler.CONTINUE
        self._conductor.stopped.add(trial.trial_id)
        return TrialScheduler.STOP

    @property
    def _factor(self) -> int:
        return self._asha.reduction_factor if self._asha else 1

    def _is_rung(self, done: int, epochs: int) -> bool:
        return self._asha is not None and done < epochs and done in rungs(self._asha, epochs)

    def __reduce__(self) -> Any:
        return (FIFOScheduler, ())


def rungs(asha: Asha, epochs: int) -> Iterator[int]:
    """The numbers of epochs after which a trial of so many can be stopped."""
    rung = asha.grace_epochs
    while rung < epochs:
        yield rung
        rung *= asha.reduction_factor


def keeps(value: float, others: Sequence[float], factor: int) -> bool:
    """Whether a value is among the best 1/factor of the others; with fewer than `factor` of them it is."""
    if len(others) < factor:
        return True
    return sum(other > value for other in others) < len(others) / factor


def _seconds(spec: Spec, rows: Sequence[Mapping[str, float]]) -> float:
    return sum(spec.images_per_epoch / row["perf/img_per_s"] for row in rows)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM as Ctrl-C: Tune then ends its trials and gives their resources back."""

    def interrupt(signum: int, frame: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _forget(places: Path, fingerprints: set[str]) -> None:
    """Removes trials of other configurations than the present one."""
    for path in places.iterdir():
        if path.is_dir() and path.name not in fingerprints:
            shutil.rmtree(path, ignore_errors=True)
