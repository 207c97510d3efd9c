"""What surrounds a clone is checked where every long stage starts, in seconds, with a line that says what to do."""

from __future__ import annotations

import importlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import psutil
import pytest

from pipeline import cluster
from pipeline.base import config, tracking_uri
from pipeline.base.errors import ConfigError
from pipeline.base.tracking_uri import check_tracking
from pipeline.base.yaml_files import read_yaml
from stages import preset, repro

ROOT = Path(__file__).resolve().parents[2]

LONG_STAGES = ["check", "train", "train_all", "sweep_recipe", "sweep_hybrid", "scaling"]

TRACKING_STAGES = ["evaluate", "throughput", "complexity", "report", "ui"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the committed params.yaml and presets and nothing else."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_stage(name: str) -> None:
    takes_run = name in ("train", "train_all", "evaluate")
    importlib.import_module(f"stages.{name}").run(*(["vit"] if takes_run else []))


@pytest.mark.parametrize("name", LONG_STAGES + TRACKING_STAGES)
def test_every_stage_that_tracks_checks_the_tracking_uri_first(name, folder, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI=./mlruns: MLflow no longer writes to folders"):
        run_stage(name)


@pytest.mark.parametrize("name", LONG_STAGES)
def test_every_stage_that_trains_checks_ray_first(name, folder, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/tmp/" + "a" * 84)
    with pytest.raises(cluster.ClusterError, match="TMPDIR=/tmp/a+ is 63 bytes too long .* set RAY_TMPDIR"):
        run_stage(name)


def test_ray_auto_without_a_cluster_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(psutil, "process_iter", lambda attributes: iter(()))
    with pytest.raises(cluster.ClusterError, match="RAY_ADDRESS=auto: no Ray cluster runs on this machine"):
        cluster.check_ray()
    with dead_port() as port:  # of a cluster that was not stopped with `ray stop`
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{port}")
        with pytest.raises(cluster.ClusterError, match=rf"auto \(found 127.0.0.1:{port}\) does not answer"):
            cluster.check_ray()
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{server.getsockname()[1]}")
        cluster.check_ray()


def test_ray_auto_takes_the_address_of_a_running_process(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code = "import sys; sys.stdin.read()"
        command = [sys.executable, "-c", code, "--gcs-address=", f"--gcs-address={address}"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            of_process = [psutil.Process(process.pid)]
            of_process[0].info = {"cmdline": of_process[0].cmdline()}  # pyright: ignore[reportAttributeAccessIssue]
            monkeypatch.setattr(psutil, "process_iter", lambda attributes: of_process)
            assert cluster._running_cluster() == address
            cluster.check_address("auto")
            process.communicate()


def test_the_longest_temporary_folder_is_that_of_rays_own_limit(monkeypatch):
    from ray._private.utils import validate_socket_filepath

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    limit = next(n for n in range(1, 107) if fails(validate_socket_filepath, "a" * n + cluster._SOCKET_PATH)) - 1
    assert limit == 26
    monkeypatch.setenv("TMPDIR", "a" * limit)
    cluster.check_ray()
    monkeypatch.setenv("TMPDIR", "ü" * (limit // 2) + "a")  # bytes count
    with pytest.raises(cluster.ClusterError, match="is 1 bytes too long"):
        cluster.check_ray()
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # takes precedence
    cluster.check_ray()
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # sockets are the cluster's matter
    monkeypatch.setattr(cluster, "check_address", lambda address: None)
    cluster.check_ray()


def fails(function, *args) -> bool:
    try:
        function(*args)
    except OSError:
        return True
    return False


@pytest.mark.parametrize("name", ["a b", "it's", "a&b", "a(1)", "$a", "a;b", "a*", "#1", "a\\b"])
def test_a_path_with_which_ray_starts_no_worker_is_refused(name, monkeypatch):
    monkeypatch.setattr(sys, "executable", f"/home/{name}/flopeq/.venv/bin/python")
    with pytest.raises(cluster.ClusterError, match="with which Ray cannot start workers: move this folder"):
        cluster.check_ray()


@pytest.mark.parametrize("name", ["a-b_c.d", "ü", "a@b", "50%", "a+b", "a=b", "a,b"])
def test_a_path_with_which_ray_starts_workers_is_accepted(name, monkeypatch):
    monkeypatch.setattr(sys, "executable", f"/home/{name}/flopeq/.venv/bin/python")
    cluster.check_ray()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("mlruns", "no longer writes to folders"),
        ("file:///tmp/mlruns", "no longer writes to folders"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:////etc/passwd/mlflow.db", "cannot be written"),
        ("http://127.0.0.1:{port}", "does not answer"),
        ("https://127.0.0.1:{port}/mlflow/", "does not answer"),
        ("postgresql+psycopg2://me:secret@127.0.0.1:{port}/mlflow", "//127.0.0.1.* does not answer"),
        ("http:127.0.0.1", "does not answer"),
    ],
)
def test_an_unusable_tracking_uri_is_refused(uri, message, monkeypatch):
    with dead_port() as port:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(port=port))
        with pytest.raises(ConfigError, match=f"(?s){message}") as refusal:
            check_tracking("digits")
    assert "secret" not in str(refusal.value)


def test_a_server_that_accepts_and_says_nothing_is_refused_within_15_s(monkeypatch):
    assert 2 * tracking_uri._PROBE_S < 15
    monkeypatch.setattr(tracking_uri, "_PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(ConfigError, match=r"does not answer \(timed out\): start that server"):
            check_tracking("digits")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("status", "stage", "refusal"),
    [
        (200, "active", None),
        (200, "deleted", "the MLflow experiment 'my digits' in .* was deleted: .* restore --experiment-id 7`"),
        (404, "", None),  # MLflow creates it
        (401, "", None),  # its client has the credentials
        (503, "", "does not answer .status 503"),
    ],
)
def test_a_server_is_asked_for_the_experiment(status, stage, refusal, monkeypatch):
    with answering_server(status, {"experiment": {"experiment_id": "7", "lifecycle_stage": stage}}) as (url, asked):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{url}/")
        if refusal:
            with pytest.raises(ConfigError, match=refusal):
                check_tracking("my digits")
        else:
            check_tracking("my digits")
    assert asked == ["/api/2.0/mlflow/experiments/get-by-name?experiment_name=my+digits"]


@pytest.mark.parametrize("name", ["50%25", "a?b"])
def test_a_folder_that_a_database_uri_cannot_name_is_refused(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(ConfigError, match="in its path, which the URI of a database cannot have: rename the folder"):
        check_tracking("digits")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    check_tracking("digits")


def test_a_relative_database_is_that_of_the_driver(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///a/mine.db?timeout=10")
    assert tracking_uri.tracking_uri() == f"sqlite:///{tmp_path}/a/mine.db?timeout=10"


def test_repro_needs_git_or_a_setting_of_dvc(folder):
    with pytest.raises(ConfigError, match="is no git repository, .*git init .*dvc config --local core.no_scm true"):
        repro.check_git()
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "--quiet"], check=True)
    repro.check_git()
    shutil.rmtree(".dvc")
    (folder / ".git").write_text("gitdir: elsewhere\n")  # a worktree
    repro.check_git()


@pytest.mark.parametrize("git", ["missing", "refuses", "ignores"])
def test_a_preset_where_git_keeps_nothing_keeps_a_copy(git, folder, monkeypatch):
    if git != "missing":
        for command in (("init",), ("add", *(["presets"] if git == "ignores" else ["."])), ("commit", "-m", "a")):
            subprocess.run(
                ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True, capture_output=True
            )
    if git == "refuses":
        monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "true")
        assert subprocess.run(["git", "status"], capture_output=True).returncode
    mine = Path("params.yaml").read_text().replace("seed: 0", "seed: 7", 1)
    Path("params.yaml").write_text(mine)
    preset.run("imagenette")
    assert preset.BACKUP.read_text() == mine
    assert read_yaml(Path("params.yaml")) == read_yaml(Path("presets/imagenette.yaml"))
    preset.run("imagenet")
    assert preset.BACKUP.read_text() == mine  # a preset needs no copy
    Path("params.yaml").write_text(mine.replace("seed: 7", "seed: 8"))
    with pytest.raises(ConfigError, match="params.yaml.orig would be overwritten"):
        preset.run("imagenette")
    assert config.load_experiment().seed == 8


def test_what_dvc_pull_does_not_bring_is_made_again_without_training():
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    uncached = {
        name: [out for out in stage.get("do", stage)["outs"] if isinstance(out, dict)]
        for name, stage in stages.items()
        if "outs" in stage.get("do", stage)
    }
    assert {name for name, outs in uncached.items() if outs} == {"shard"}  # the manifest of the shards, which are local


@contextmanager
def dead_port() -> Iterator[int]:
    """A port that is bound and not listening: nobody answers there."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@contextmanager
def answering_server(status: int, content: object) -> Iterator[tuple[str, list[str]]]:
    """A server that answers every request alike. Yields its URL and the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()
