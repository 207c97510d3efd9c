"""Trains a run of the experiment with Ray Train and writes outputs/<run>.

The fingerprint of a configuration names its checkpoint folder, and `run.json` there holds its MLflow run. A training of
the same configuration resumes from the latest checkpoint, in the same MLflow run, however it ended before. A training
that has ended only writes its outputs again (pipeline/training/outputs.py). A different configuration starts from the
beginning, beside what the others left, or from a checkpoint that it is told to adopt.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from pipeline import cluster
from pipeline.base import locks
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError
from pipeline.shards import manifests
from pipeline.training import adoption, loop, outputs, recipe, report_log
from pipeline.training.checkpoints import CheckpointManager
from pipeline.training.epoch_tracker import EpochTracker
from pipeline.training.fingerprint import hash_inputs, training_inputs
from pipeline.training.run_directory import RAY_RUN_PREFIX, RunDirectory
from pipeline.training.worker import WorkerTask, train_loop_per_worker

logger = logging.getLogger(__name__)

_MAX_FAILURES = 3  # of workers or nodes, without progress in between


def train_run(experiment: Experiment, run_name: str, *, adopt: str | None = None) -> None:
    """Trains or resumes a run and writes outputs/<run>/, the outs of the stage `train@<run>`.

    Args:
        adopt: fingerprint of another configuration of this run, to continue from its latest checkpoint.
    Raises:
        ConfigError, ShardError, ClusterError: for invalid parameters, data or cluster, or a checkpoint that does not
            fit.
        BusyError: if another process trains this run.
    """
    shards = manifests.Shards(experiment.data.shards, cache_gib=experiment.data.cache_gib)
    settings, configuration = experiment.train, experiment.resolved(run_name)
    # These checks would otherwise fail late, on the workers.
    recipe.check_recipe(experiment.recipe(run_name), experiment.data, settings)
    model = _build_model(experiment, run_name, shards.num_classes, device="meta")
    cluster.connect(cpus=settings.least_workers * settings.cpus_per_worker)
    gpu = _use_gpu(experiment)
    inputs = training_inputs(configuration, shards)
    run_dir = RunDirectory.for_run(experiment, run_name, hash_inputs(inputs))
    with locks.hold_lock(run_dir.lock_file, f"the run {run_name} in {Path.cwd()}"):
        if adopt is not None:
            names = loop.evaluated_names(experiment.recipe(run_name))
            adoption.adopt_checkpoint(run_dir, adopt, inputs, model, names)
        if not run_dir.list_checkpoints():
            adoption.log_other_configurations(run_dir, inputs, run_name)
        run_dir.resume_or_create(inputs)
        _train(experiment, run_name, shards, configuration, run_dir, gpu=gpu)


def _train(
    experiment: Experiment,
    run_name: str,
    shards: manifests.Shards,
    configuration: dict[str, Any],
    run_dir: RunDirectory,
    *,
    gpu: bool,
) -> None:
    """Trains to the end, saves the outcome and writes the outputs. Exits with 143 if it was asked to stop."""
    settings = experiment.train
    checkpoints = CheckpointManager(run_dir.checkpoints_location, keep=settings.keep_checkpoints)
    task = WorkerTask(
        experiment, run_name, str(Path.cwd()), run_dir.checkpoints_location, run_dir.stop_file, log_steps=True
    )
    scaling = ray.train.ScalingConfig(
        num_workers=settings.workers,
        use_gpu=gpu,
        resources_per_worker={"CPU": settings.cpus_per_worker, **({"GPU": 1} if gpu else {})},
    )

    from pipeline import track  # imported only once the run is sure to start: MLflow takes seconds

    with _stop_on_sigterm(run_dir):
        mlflow_run_id = track.start_run(
            experiment,
            run_name,
            resume=run_dir.load("run").get("mlflow_run_id"),
            adopted=run_dir.load("adopted").get("fingerprint"),
        )
        run_dir.save_status(mlflow_run_id, "running")
        status = "interrupted"
        try:
            with (
                EpochTracker(run_name, partial(_log_metrics, mlflow_run_id)) as tracker,
                report_log.follow_reports(
                    run_dir.report_log, _make_report_handler(experiment, run_name, tracker)
                ) as callback,
            ):
                outcome = _fit_with_restarts(task, scaling, run_dir.storage, callback, checkpoints)
            if outcome["status"] == "stopped":
                logger.warning("%s was stopped and saved a checkpoint: the same command resumes from it", run_name)
                sys.exit(128 + signal.SIGTERM)
            weights = _save_best_weights(
                checkpoints, outcome, lambda: _build_model(experiment, run_name, shards.num_classes)
            )
            run_dir.save("outcome", {**outcome, "weights": weights, "configuration": configuration})
            status = outcome["status"]
            run_dir.save_status(mlflow_run_id, status)
        except Exception:
            status = "failed"
            raise
        finally:
            run_dir.cleanup()
            if status in ("interrupted", "failed"):  # otherwise, MLflow gets the status with the outcome
                outputs.try_tracking(
                    lambda: track.end_run(mlflow_run_id, status), f"MLflow shows {run_name} as running"
                )
        outputs.write_outputs(run_dir)
        outputs.track_outcome(run_dir)


def _fit_with_restarts(
    task: WorkerTask,
    scaling: ray.train.ScalingConfig,
    storage: str,
    callback: report_log.ReportLog,
    checkpoints: CheckpointManager,
) -> dict[str, Any]:
    """Returns the result of rank 0. Restarts after worker and node failures as long as training makes progress.

    Raises: the workers' error, if it is one of ours (ConfigError, ShardError, ...); otherwise Ray's.
    """
    while True:
        before = checkpoints.list_names()
        trainer = SigintSafeTrainer(
            lambda: train_loop_per_worker(task),
            scaling_config=scaling,
            run_config=ray.train.RunConfig(
                name=f"{RAY_RUN_PREFIX}{time.time_ns()}",  # new each time, so that Ray restores nothing
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=_MAX_FAILURES),
                callbacks=[callback],
            ),
        )
        try:
            outcome = trainer.fit().return_value
        except ray.train.TrainingFailedError as error:
            for cause in _worker_errors(error):
                if type(cause).__module__.startswith("pipeline."):
                    raise cause from None
            if checkpoints.list_names()[-1:] == before[-1:]:
                raise
            logger.warning("%d failures: restarting from the latest checkpoint", _MAX_FAILURES + 1)
        else:
            assert outcome is not None  # rank 0 has returned
            return outcome


def _worker_errors(error: Exception) -> list[BaseException]:
    """Returns the errors that the workers raised."""
    failures = getattr(error, "worker_failures", {}).values()
    return [getattr(failure, "_base_exc", failure) for failure in failures]


@contextmanager
def _stop_on_sigterm(run_dir: RunDirectory) -> Iterator[None]:
    """Requests the workers to stop on SIGTERM, which a preempted job receives."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: run_dir.request_stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class SigintSafeTrainer(TorchTrainer):
    """A TorchTrainer without Ray's Ctrl-C handler."""

    def _register_sigint_handler(self, controller: Any) -> None:
        """Does nothing: Ray's handler may exit with status 0. Python's own ends the driver, and with it Ray's job."""


def _use_gpu(experiment: Experiment) -> bool:
    """Whether each worker gets a GPU. Raises ClusterError if the cluster is too small; Ray would wait forever."""
    settings, available = experiment.train, ray.cluster_resources()
    gpu = available.get("GPU", 0) > 0 if settings.gpu == "auto" else settings.gpu
    workers = settings.least_workers
    for kind, needed in (("CPU", workers * settings.cpus_per_worker), ("GPU", workers * gpu)):
        if available.get(kind, 0) < needed:
            raise cluster.ClusterError(
                f"train.workers {workers} x train.cpus_per_worker {settings.cpus_per_worker} needs {needed} "
                f"{kind}s, but the Ray cluster has {available.get(kind, 0):.0f}: lower them, or unset RAY_ADDRESS"
            )
    if settings.amp == "fp16" and not gpu:
        raise ConfigError("train.amp: fp16 needs a GPU; on CPU use bf16 or null")
    return gpu


def _build_model(experiment: Experiment, run_name: str, num_classes: int, device: str = "cpu") -> torch.nn.Module:
    return recipe.build_model(
        experiment.run(run_name),
        experiment.recipe(run_name),
        num_classes=num_classes,
        seed=experiment.seed_of(run_name),
        device=device,
    )


def _make_report_handler(
    experiment: Experiment, run_name: str, tracker: EpochTracker
) -> Callable[[dict[str, Any]], None]:
    """Returns a function that logs each report and passes metrics of epochs and steps on to the tracker."""
    recipe_, eta_start = experiment.recipe(run_name), []

    def handle_report(entry: dict[str, Any]) -> None:
        if "failed" in entry:
            failures = "; ".join(f"rank {rank}: {message}" for rank, message in entry["failed"].items())
            logger.warning("%s lost workers and restarts them (%s)", run_name, failures)
        elif "start_step" in entry:
            eta_start.clear()
            _log_start(run_name, entry, recipe_.global_batch_size)
            if experiment.train.compile and not entry["compiled"]:
                logger.warning("%s: %s", run_name, report_log.EAGER_WARNING)
        elif "epoch" in entry:
            now, epoch, left = time.monotonic(), entry["epoch"], recipe_.epochs - entry["epoch"] - 1
            eta_start[:] = eta_start or [epoch, now]
            eta = "" if epoch <= eta_start[0] else f"  ETA {(now - eta_start[1]) / (epoch - eta_start[0]) * left:.0f} s"
            logger.info(
                "%s  epoch %d/%d  lr %.2e  loss %.4f  top-1 %.2f %%  %.0f img/s%s",
                run_name,
                epoch + 1,
                recipe_.epochs,
                entry["lr"],
                entry["train/loss"],
                entry["val/top1_pct"],
                entry["perf/img_per_s"],
                eta,
            )
        if "steps" in entry or "epoch" in entry:
            tracker.add(entry)

    return handle_report


def _log_metrics(mlflow_run_id: str, epochs: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    from pipeline import track

    track.log_steps(mlflow_run_id, steps)
    track.log_epochs(mlflow_run_id, epochs)


def _log_start(run_name: str, entry: dict[str, Any], global_batch_size: int) -> None:
    for name, fault in entry["passed_over"].items():
        logger.warning("%s: checkpoint %s is skipped: %s", run_name, name, fault)
    logger.info(
        "%s %s step %d of %d  workers %d  images %d per step, %d per forward pass and worker",
        run_name,
        "resumes from" if entry["start_step"] else "starts at",
        entry["start_step"],
        entry["num_steps"],
        entry["workers"],
        global_batch_size,
        entry["batch_size"],
    )


def _save_best_weights(
    checkpoints: CheckpointManager, outcome: dict[str, Any], initial: Callable[[], torch.nn.Module]
) -> dict[str, dict[str, str]]:
    """Returns the files of the best weights: those of the last checkpoint or, without one, of the initial weights."""
    latest = checkpoints.latest()
    if latest is not None:
        return checkpoints.weights_entries(latest)
    return checkpoints.save_weights("initial", dict.fromkeys(outcome["best_epoch"], loop.copy_weights(initial())))
