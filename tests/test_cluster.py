"""Clusters: room for runs, two nodes, SLURM; the files in deploy/."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipeline import cluster, track
from pipeline.base import schema
from pipeline.base.yaml_files import dump_yaml, read_yaml
from stages import job
from tests.conftest import free_port, params_with_runs, ray_tmpdir, wait_for

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("nodes", "train", "room"),
    [
        ([{"CPU": 2}], {}, 2),
        ([{"CPU": 2}], {"workers": 3}, 0),
        ([{"CPU": 3}, {"CPU": 3}], {"cpus_per_worker": 2}, 2),  # a worker does not lie across nodes
        ([{"CPU": 96, "GPU": 8}] * 4, {"workers": 16, "cpus_per_worker": 8}, 2),
        ([{"CPU": 96, "GPU": 8}] * 4, {"workers": [8, 32], "cpus_per_worker": 8}, 1),  # one that takes all there is
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], {"cpus_per_worker": 4}, 1),  # a head without GPUs does not count
        ([{"CPU": 64}, {"CPU": 8, "GPU": 1}], {"cpus_per_worker": 4, "gpu": False}, 18),
    ],
)
def test_concurrent_runs_count_whole_workers(nodes, train, room, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
    settings = read_yaml(ROOT / "params.yaml")["train"]
    assert cluster.max_concurrent_runs(schema.Train.model_validate({**settings, **train})) == room


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[tuple[str, str]]:
    """A Ray cluster of two nodes with a core each: its address, and that of its job API."""
    from ray.cluster_utils import Cluster

    port, patch = free_port(), pytest.MonkeyPatch()
    patch.setenv("RAY_TMPDIR", ray_tmpdir())
    nodes = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": port,
            "dashboard_agent_listen_port": free_port(),
        },
    )
    nodes.add_node(num_cpus=1, dashboard_agent_listen_port=free_port())
    try:
        wait_for(lambda: takes_jobs(f"http://127.0.0.1:{port}"), 60)
        yield nodes.address, f"http://127.0.0.1:{port}"
    finally:
        nodes.shutdown()
        patch.undo()


def takes_jobs(url: str) -> bool:
    """The job API answers a while before it can start anything."""
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(url).submit_job(entrypoint="true")
    except (RuntimeError, ConnectionError):
        return False
    return True


def checkout(folder: Path, **settings) -> Path:
    """What a user submits: the code, two short runs, and files that must stay at home."""
    folder.mkdir()
    for name in (*job.CODE, ".rayignore", ".gitignore"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    params = params_with_runs("vit", "e-vit")
    params["recipes"]["digits"] |= {"epochs": 2, "warmup_epochs": 1, "global_batch_size": 256}
    params["train"] |= settings
    params["throughput"] |= {"compile": False, "paper_sizes": False, "runs": 3}
    (folder / "params.yaml").write_text(dump_yaml(params))
    return folder


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def spans(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Beginning and end of the MLflow runs in a folder, all of which finished."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    runs = track._client().search_runs([track._experiment_id(track._client(), "digits")])
    assert {run.info.status for run in runs} == {"FINISHED"}
    return sorted((run.info.start_time, run.info.end_time) for run in runs)


@pytest.mark.slow
def test_a_submitted_job_leaves_its_results_in_its_folder(two_nodes, tmp_path, monkeypatch):
    home, place = checkout(tmp_path / "home"), tmp_path / "study"
    (home / "data").mkdir()
    (home / "data" / "photos.tar").write_bytes(os.urandom(101 << 20))  # more than Ray would upload
    command = [sys.executable, "-m", "stages.job", str(place), "repro", "--runs", "vit", "e-vit"]
    done = subprocess.run(
        [
            Path(sys.executable).with_name("ray"),
            "job",
            "submit",
            "--address",
            two_nodes[1],
            "--working-dir",
            ".",
            "--",
            *command,
        ],
        cwd=home,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Running stage 'evaluate@vit'" in done.stdout
    for name in ("vit", "e-vit"):  # DVC took over what was trained ahead of it
        assert f"{name} is trained already" in done.stdout + done.stderr
    for name in ("vit", "e-vit"):
        metrics = json.loads((place / "outputs" / name / "metrics.json").read_text())
        assert metrics["val/top1_pct"] > 10
        assert (place / "outputs" / name / "weights.safetensors").exists()
    assert not (home / "outputs").exists()
    for folder in ("flopeq", "pipeline", "presets", "stages"):
        assert files_below(place / folder) == files_below(home / folder)
    first, second = spans(place, monkeypatch)
    assert second[0] < first[1]  # side by side: there is a core for each

    before = (place / "dvc.lock").read_bytes()
    subprocess.run(command, cwd=home, check=True, capture_output=True)  # nothing is left to do
    assert (place / "dvc.lock").read_bytes() == before


@pytest.mark.slow
def test_runs_that_take_all_nodes_train_one_after_the_other(two_nodes, tmp_path, monkeypatch):
    place = checkout(tmp_path / "study", workers=2)
    monkeypatch.chdir(place)
    for stage in ("prepare", "shard"):
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-m", "stages.train_all", "vit", "e-vit"],
        text=True,
        capture_output=True,
        env={**os.environ, "RAY_ADDRESS": two_nodes[0]},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = spans(place, monkeypatch)
    assert second[0] >= first[1]


def test_each_local_cluster_has_a_folder_of_its_own(tmp_path, monkeypatch):
    """In the folder of another cluster, processes of Ray Train would look for their training, and end it."""
    folders = []
    ray = SimpleNamespace(
        init=lambda **_: folders.append(Path(os.environ["RAY_TMPDIR"])),
        get_runtime_context=lambda: SimpleNamespace(gcs_address="127.0.0.1:1"),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    for _ in range(2):  # the second is not in the folder of the first
        cluster._start_local_cluster(cpus=1)
    assert len(set(folders)) == 2 and {folder.parent for folder in folders} == {tmp_path}


def test_the_launchers_file_is_what_ray_takes():
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = yaml.safe_load((ROOT / "deploy" / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(content))
    for there, here in content["file_mounts"].items():
        assert (ROOT / here).is_file(), there


def test_the_kuberay_manifest_mounts_what_it_declares_and_runs_the_pinned_ray():
    manifest = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    spec = manifest["spec"]["rayClusterSpec"]
    assert f"ray=={spec['rayVersion']}\n" in (ROOT / "constraints.txt").read_text()
    assert set(yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])) == {"working_dir", "env_vars"}
    (workers,) = spec["workerGroupSpecs"]
    assert workers["minReplicas"] == workers["replicas"] == workers["maxReplicas"]
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_commands_of_docs_and_deploy_exist():
    texts = [path.read_text() for path in (*(ROOT / "deploy").iterdir(), ROOT / "docs" / "cluster.md")]
    stages = {name for text in texts for name in re.findall(r"-m stages\.(\w+)", text)}
    jobs = {name for text in texts for name in re.findall(r"stages\.job /\S+ (\w+)", text)}
    assert jobs == {"repro", "train_all"} and "job" in stages
    for name in stages | jobs:
        assert (ROOT / "stages" / f"{name}.py").is_file(), name
    targets = {name for text in texts for name in re.findall(r"(?:\$ |`|# +)(?:\w+=\S+ )*make (\w+)", text)}
    makefile = (ROOT / "Makefile").read_text()
    assert {"repro", "plan"} <= targets
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in targets)
    assert all((ROOT / path).exists() for text in texts for path in re.findall(r"deploy/[\w.-]+\w", text))


def test_nodes_install_what_the_pipeline_declares_but_not_flopeq_itself(root):
    listed = subprocess.check_output([sys.executable, "deploy/requirements.py", "pyproject.toml"], cwd=root, text=True)
    packages = [re.split(r"[\[><=]", line)[0] for line in listed.split("\n") if line]
    assert {"torch", "ray", "dvc", "mlflow", "s3fs"} <= set(packages) and "flopeq" not in packages
    pinned = {line.partition("==")[0].lower() for line in (root / "constraints.txt").read_text().splitlines()}
    assert set(packages) <= pinned


# Stand-ins on one machine for what SLURM offers: `srun` drops its options and runs the command here.
SLURM = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> scontrol.log; [ "$1" != show ] || echo localhost',
    "hostname": "echo 127.0.0.1",
}


def sbatch(place: Path, *words: str) -> subprocess.Popen[str]:
    """The SLURM script at work in a folder with a clone's .venv, on one node."""
    bin_ = place / "bin"
    bin_.mkdir()
    for name, script in SLURM.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{script}\n")
        (bin_ / name).chmod(0o755)
    activate = place / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={bin_}:{Path(sys.executable).parent}:$PATH\n")
    slurm = {
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
    }
    return subprocess.Popen(
        [ROOT / "deploy" / "slurm.sh", *words],
        env={**os.environ, **slurm},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
def test_the_slurm_script_trains_in_a_cluster_of_its_own_and_queues_again_when_stopped(tmp_path, monkeypatch):
    place = checkout(tmp_path / "clone")
    params = read_yaml(place / "params.yaml")
    params["recipes"]["digits"]["epochs"] = 2000
    (place / "params.yaml").write_text(dump_yaml(params))
    monkeypatch.chdir(place)
    for stage in ("prepare", "shard"):
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], check=True, capture_output=True)
    script = sbatch(place, "train_all", "vit")
    assert script.stdout is not None
    output = ""
    for line in script.stdout:
        output += line
        if "epoch 2/2000" in line:
            break
    else:
        pytest.fail(output)
    script.send_signal(signal.SIGTERM)
    rest, _ = script.communicate(timeout=100)
    assert script.returncode == 128 + signal.SIGTERM and "was stopped and saved a checkpoint" in rest
    assert f"requeue {os.getpid()}" in Path("scontrol.log").read_text()
    assert list(place.glob("outputs/vit/checkpoints/*/steps/step-*/complete.json"))
