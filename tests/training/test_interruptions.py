"""Nothing is lost: trainings that are killed, stopped or damaged go on from where they were, to the same weights."""

from __future__ import annotations

import functools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, FileSystem, FileType
from ray.cluster_utils import Cluster

from pipeline import track
from pipeline.base import config
from pipeline.packing import pack
from pipeline.packing.sources import digits
from pipeline.training import trainer
from tests.conftest import params_with_runs, ray_cluster
from tests.training import paused_training
from tests.training.interruptions import (
    EPOCHS,
    EVERY,
    PER_EPOCH,
    Outputs,
    assert_identical,
    assert_nothing_left,
    assert_one_whole_mlflow_run,
    interrupted,
    kill,
    outputs,
    pause_settings,
    prepare_trial,
    resumed,
    start,
    steps,
    until,
    wait_for_exit,
    wait_until_paused,
    write,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # Ray warns of its own use of itself
]

ROOT = Path(__file__).resolve().parents[2]

# The Ray cluster, and folders to work in


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of a local server."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        FileSystem.from_uri("s3://bucket?allow_bucket_creation=true")[0].create_dir("bucket")
        yield "s3://bucket/flopeq"
    server.stop()


@pytest.fixture(scope="module")
def cluster(s3: str) -> Iterator[Cluster]:
    """A cluster of two nodes, the head with one core and a `second` one."""
    noticing = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    with ray_cluster(num_cpus=1, _system_config=noticing) as cluster:
        yield cluster


def second(cluster: Cluster, cpus: int) -> Any:
    """The second node, with so many cores: the one that is there, or another one."""
    for node in list(cluster.worker_nodes):
        if node._ray_params.num_cpus == cpus:
            return node
        cluster.remove_node(node)
    return cluster.add_node(num_cpus=cpus)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards of every fourth digit, an experiment of one small run, and MLflow's empty database."""
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = params_with_runs("vit")
        params["data"] |= {"name": "fourth", "source": "data/source/fourth"}
        params["recipes"]["digits"] |= {
            "epochs": EPOCHS,
            "warmup_epochs": 1,
            "global_batch_size": 16,
            "mixup_group": 4,
            "drop_path": 0.2,
            "mixup_alpha": 0.2,
            "random_erasing": 0.25,
            "ema_decay": 0.9,
        }
        params["train"] |= {"gpu": False, "checkpoint_steps": EVERY}
        write(params)
        data = config.load_experiment().data
        digits.write_digits(Path(data.source))
        for split in ("train", "val"):
            for index, path in enumerate(sorted(Path(data.source, split).rglob("*.jpg"))):
                if index % 4:
                    path.unlink()
        pack.pack_source(data.source, data.shards, images_per_shard=512, seed=0)
        MlflowClient(track.tracking_uri()).search_experiments()
    return folder


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template as the working directory, where trainings wait as their trial says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "train_loop_per_worker", paused_training.train_loop_per_worker)
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def reference_run(cluster: Cluster, template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outputs]:
    """What a training leaves that nothing happened to, by number of workers and other settings."""

    @functools.cache
    def of(workers: int, float64: bool = False) -> Outputs:
        with pytest.MonkeyPatch.context() as patch:
            folder = tmp_path_factory.mktemp("reference_run")
            shutil.copytree(template, folder, dirs_exist_ok=True)
            patch.chdir(folder)
            patch.setattr(trainer, "train_loop_per_worker", paused_training.train_loop_per_worker)
            second(cluster, max(1, workers - 1))
            prepare_trial(workers=workers, float64=float64)
            trainer.train_run(config.load_experiment(), "vit")
            return outputs()

    return of


# Killed, stopped, damaged


def test_a_killed_driver_leaves_nothing_behind_and_its_training_goes_on(cluster, reference_run, place, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    wait, expected = pause_settings("kill the driver"), reference_run(1)
    prepare_trial(**wait)
    alone = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    with start("tests.training.paused_training", "vit", env=alone) as driver:  # with a cluster of its own
        wait_until_paused(driver)
        [process] = [process for process in psutil.Process().children() if process.pid == driver.pid]
        started = process.children(recursive=True)
        assert len(started) > 3
        driver.kill()
        wait_for_exit(driver)
    assert not Path("outputs/vit/run.json").exists()
    trainer.train_run(config.load_experiment(), "vit")
    assert_identical(outputs(), expected)
    [step] = resumed(caplog.text)
    assert 0 < step <= wait["step"]
    assert_one_whole_mlflow_run()
    assert_nothing_left()
    assert not psutil.wait_procs(started, timeout=60)[1]  # Ray's agents take half a minute to see that they are alone


def test_a_replaced_node_resumes_to_the_same_weights(cluster, reference_run, place, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "pipeline")
    wait, expected = pause_settings("lose a node", workers=2), reference_run(2)
    node = second(cluster, 1)
    prepare_trial(workers=2, **wait)
    monkeypatch.setattr(cluster, "_shutdown_at_exit", False)  # for that, Ray sets signal handlers: not in this thread

    def replace(_: int) -> None:
        cluster.remove_node(node, allow_graceful=False)
        time.sleep(2)
        second(cluster, 1)

    with interrupted(replace):
        trainer.train_run(config.load_experiment(), "vit")
    assert_identical(outputs(), expected)
    [step] = resumed(caplog.text)
    assert 0 < step <= wait["step"]
    assert_one_whole_mlflow_run()
    assert_nothing_left()


def test_a_lost_node_that_is_not_replaced_leaves_the_same_mathematics(
    cluster, reference_run, place, caplog, monkeypatch
):
    caplog.set_level(logging.INFO, "pipeline")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")  # for the second worker, which Ray waits for
    wait, expected = pause_settings("lose a node for good", workers=2), reference_run(1, float64=True)
    node = second(cluster, 1)
    prepare_trial(workers=[1, 2], float64=True, **wait)
    with interrupted(lambda _: cluster.remove_node(node, allow_graceful=False)):
        trainer.train_run(config.load_experiment(), "vit")
    found = outputs()
    for name, weight in expected.weights.items():
        assert weight.dtype == torch.float64
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-10)
    [step] = resumed(caplog.text)
    assert 0 < step <= wait["step"]
    assert "workers 2" in caplog.text and "workers 1" in caplog.text.split("resumes from")[1]
    assert_one_whole_mlflow_run()
    assert_nothing_left()


def test_a_training_asked_to_stop_leaves_a_checkpoint_of_its_very_step(cluster, reference_run, place, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    wait, expected = pause_settings("stop", workers=2), reference_run(2)
    second(cluster, 1)
    prepare_trial(workers=2, **wait)
    with start("tests.training.paused_training", "vit") as driver:
        wait_until_paused(driver)
        driver.send_signal(signal.SIGTERM)
        until(lambda: list(Path("outputs/vit").rglob("stop")))
        time.sleep(2)  # rank 0 looks once a second
        Path("released").touch()
        told = wait_for_exit(driver)
    assert driver.returncode == 143, told
    assert "the same command resumes" in told and "Traceback" not in told
    assert wait["step"] < steps()[-1] <= wait["step"] + 3
    assert_nothing_left()
    trainer.train_run(config.load_experiment(), "vit")
    [step] = resumed(caplog.text)
    assert wait["step"] < step
    assert_identical(outputs(), expected)
    assert_one_whole_mlflow_run()
    assert_nothing_left()


def test_a_killed_worker_of_three_resumes_from_the_checkpoint_before_a_truncated_one(
    cluster, reference_run, place, caplog
):
    caplog.set_level(logging.INFO, "pipeline")
    wait, expected = pause_settings("cut", workers=3, least=2 * EVERY + 2), reference_run(3)
    second(cluster, 2)
    prepare_trial(workers=3, **wait)
    there = []

    def cut(process: int) -> None:
        until(lambda: len(steps()) == 2 and steps()[-1] > wait["step"] - 2 * EVERY)
        there.extend(steps())
        state = next(Path("outputs/vit").rglob(f"step-{there[-1]:08d}/state.pt"))
        os.truncate(state, state.stat().st_size // 2)
        kill(process)

    with interrupted(cut):
        trainer.train_run(config.load_experiment(), "vit")
    assert resumed(caplog.text) == there[:1]
    assert f"checkpoint step-{there[1]:08d} is skipped: state.pt has" in caplog.text
    assert "vit lost workers" in caplog.text and caplog.text.count("\n") < 16
    assert_identical(outputs(), expected)
    assert_one_whole_mlflow_run()
    assert_nothing_left()


def test_a_killed_worker_of_two_resumes_from_checkpoints_at_s3(cluster, s3, reference_run, place, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    wait, expected = pause_settings("s3", workers=2, least=3 * EVERY), reference_run(2)
    second(cluster, 1)
    prepare_trial(workers=2, storage=s3, **wait)
    Path("anywhere").touch()  # the trial cannot see these checkpoints

    def kill_later(process: int) -> None:
        files, root = FileSystem.from_uri(s3)
        until(
            lambda: any(
                path.base_name == "complete.json" for path in files.get_file_info(FileSelector(root, recursive=True))
            )
        )
        kill(process)

    with interrupted(kill_later):
        trainer.train_run(config.load_experiment(), "vit")
    assert_identical(outputs(), expected)
    [step] = resumed(caplog.text)
    assert 0 < step <= wait["step"]
    assert "vit lost workers" in caplog.text
    files, root = FileSystem.from_uri(s3)
    found = [entry for entry in files.get_file_info(FileSelector(root, recursive=True)) if entry.type == FileType.File]
    assert len([entry for entry in found if entry.base_name == "complete.json"]) == 2
    assert not [entry.path for entry in found if "/ray-" in entry.path or "/stop" in entry.path]
    assert_one_whole_mlflow_run()
    assert_nothing_left()


# Under DVC


@pytest.fixture
def project(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place with what DVC runs, where the stage `train` is a trial's."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # stages say `python`
    # In it DVC runs its stages; dash would stay in between and end by the signal itself, with its own status.
    monkeypatch.setenv("SHELL", str(shutil.which("bash")))
    for name in ("flopeq", "pipeline", "stages", "dvc.yaml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, place / name)
    Path("stages/train.py").write_text(
        "from stages import run_stage\nfrom tests.training.paused_training import run\n\nrun_stage(run)\n"
    )
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True)
    return place


def test_the_whole_pipeline_stopped_by_sigterm_and_then_by_ctrl_c_goes_on_where_it_was(cluster, reference_run, project):
    expected = reference_run(1)
    first, then = sorted(random.Random("dvc").sample(range(EVERY + 1, EPOCHS * PER_EPOCH - 4, 4), 2))
    prepare_trial(rank=0, step=first)
    with start("stages.repro") as repro:
        wait_until_paused(repro)
        trained = next(path for path in Path().glob("outputs/vit/checkpoints/*") if path.is_dir())
        repro.send_signal(signal.SIGTERM)
        until((trained / "stop").exists)
        time.sleep(2)  # rank 0 looks once a second
        Path("released").touch()
        told = wait_for_exit(repro)
    assert repro.returncode == 143, told
    assert first < steps()[-1] <= first + 3
    assert_nothing_left()

    for name in ("reached", "released"):
        Path(name).unlink()
    prepare_trial(rank=0, step=then)
    repeat = ("dvc", "repro", "--single-item", "train@vit")
    with start(*repeat, start_new_session=True) as dvc:
        wait_until_paused(dvc)
        since = time.monotonic()
        os.killpg(dvc.pid, signal.SIGINT)  # as a terminal sends it
        told = wait_for_exit(dvc)
        assert time.monotonic() - since < 15
    assert dvc.returncode != 0 and "exited with 130" in told, told
    [went_on] = resumed(told)
    assert went_on > first
    assert_nothing_left()

    with start(*repeat) as dvc:
        told = wait_for_exit(dvc)
    assert dvc.returncode == 0, told
    [went_on] = resumed(told)
    assert first < went_on <= then
    assert_identical(outputs(), expected)
    assert_one_whole_mlflow_run()
    assert_nothing_left()


def test_a_stage_that_dvc_runs_gets_the_sigterm_of_the_pipeline(project):
    Path("stages/slow.py").write_text(
        "import os, signal, sys, time\nfrom pathlib import Path\nfrom stages import run_stage\n\n"
        "def stop(*_):\n    time.sleep(1)\n    Path('stopped').touch()\n    sys.exit(143)\n\n"
        "def run():\n    signal.signal(signal.SIGTERM, stop)\n\n"
        "    Path('reached.partial').write_text(str(os.getpid()))\n"
        "    Path('reached.partial').rename('reached')\n    time.sleep(60)\n\nrun_stage(run)\n"
    )
    Path("dvc.yaml").write_text("stages:\n  slow:\n    cmd: python -m stages.slow\n")
    with subprocess.Popen([sys.executable, "-c", "from stages import repro; repro._run_dvc('repro')"]) as repro:
        stage = psutil.Process(wait_until_paused())
        repro.send_signal(signal.SIGTERM)
        assert repro.wait(timeout=30) == 143
    assert not stage.is_running() and Path("stopped").exists()
