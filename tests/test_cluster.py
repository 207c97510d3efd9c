"""Clusters: independent runs side by side, jobs whose results last, two nodes; the files in deploy/."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from pipeline import cluster, track
from pipeline.base import config, locks, schema
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, parse_yaml, read_yaml
from stages import job, preset, seeds, train_all
from tests.conftest import free_port, params_with_runs, ray_tmpdir

ROOT = Path(__file__).resolve().parent.parent

# Stands in for a training: notes when it began and ended, takes a second, and ends orderly when told to.
TRAINING = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    Path(f"{sys.argv[1]}.stopped").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
began = time.time()
Path(f"{sys.argv[1]}.began").touch()
time.sleep(30 if sys.argv[1].startswith("long") else 0.5)
Path(f"{sys.argv[1]}.ended").write_text(f"{began} {time.time()}")
sys.exit(3 if sys.argv[1] == "broken" else 0)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which `python -m stages.train` is TRAINING, under a cluster with room for two."""
    monkeypatch.chdir(tmp_path)
    Path("stages").mkdir()
    Path("stages/__init__.py").touch()
    Path("stages/train.py").write_text(TRAINING)
    monkeypatch.setattr(cluster, "connect", lambda cpus: None)
    monkeypatch.setattr(cluster, "max_concurrent_runs", lambda settings: 2)
    monkeypatch.setattr(track, "create_experiment", lambda name: None)
    return tmp_path


def overlaps(names: list[str]) -> int:
    """How many of these stand-ins were at work at once, at most."""
    spans = [tuple(map(float, Path(f"{name}.ended").read_text().split())) for name in names]
    return max(sum(began <= at < ended for began, ended in spans) for at, _ in spans)


def test_runs_train_in_parallel_up_to_the_capacity(stand_in):
    names = ["a", "b", "c", "d"]
    assert train_all.train_runs(names, config.load_experiment(ROOT / "params.yaml")) == dict.fromkeys(names, 0)
    assert overlaps(names) == 2


def test_one_run_starts_even_when_the_cluster_is_full(stand_in, monkeypatch):
    monkeypatch.setattr(cluster, "max_concurrent_runs", lambda settings: 0)
    names = ["a", "b"]
    assert train_all.train_runs(names, config.load_experiment(ROOT / "params.yaml")) == dict.fromkeys(names, 0)
    assert overlaps(names) == 1


def test_a_failed_run_does_not_stop_the_others(stand_in):
    assert train_all.train_runs(["broken", "a", "b"], config.load_experiment(ROOT / "params.yaml")) == {
        "broken": 3,
        "a": 0,
        "b": 0,
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_that_run_and_starts_nothing_more(stand_in, number):
    program = f"""
import sys
from pipeline import cluster, track
from pipeline.base import config
from stages import train_all

cluster.connect, cluster.max_concurrent_runs = lambda cpus: None, lambda settings: 2
track.create_experiment = lambda name: None
train_all.train_runs(["long-a", "long-b", "c"], config.load_experiment({str(ROOT / "params.yaml")!r}))
"""
    Path("program.py").write_text(program)
    # From elsewhere, so that its own `stages` is the true one and that of the trainings the stand-in.
    process = subprocess.Popen([sys.executable, "-P", "program.py"], env={**os.environ, "PYTHONPATH": str(ROOT)})
    wait_for(lambda: Path("long-a.began").exists() and Path("long-b.began").exists(), 60)
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert Path("long-a.stopped").exists() and Path("long-b.stopped").exists()
    assert not Path("c.began").exists()


def wait_for(happened, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in ("params.yaml", "presets/imagenet.yaml"):
        Path(path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, path)
    return tmp_path


def test_adding_seeds_twice_adds_runs_once(experiment):
    before = Path("params.yaml").read_text()
    names = seeds.add_seeds(["e-vit", "vit"], [0, 1, 2])
    assert names == ["e-vit", "e-vit-seed1", "e-vit-seed2", "vit", "vit-seed1", "vit-seed2"]
    loaded = config.load_experiment()
    for name in names:
        base = loaded.run(name.partition("-seed")[0])
        assert loaded.run(name).model_copy(update={"seed": None}) == base
    assert [loaded.seed_of(name) for name in names] == [0, 1, 2, 0, 1, 2]
    after = Path("params.yaml").read_text()
    assert seeds.add_seeds(["e-vit", "vit"], [0, 1, 2]) == names and Path("params.yaml").read_text() == after
    assert "".join(line for line in after.splitlines(True) if "-seed" not in line) == before  # comments and all
    assert seeds.without_seed_runs(parse_yaml(after, "")) == parse_yaml(before, "")


def test_seeds_of_no_run_or_under_a_taken_name_are_refused(experiment):
    with pytest.raises(ConfigError, match="RUNS=e-vit SEEDS="):
        seeds.add_seeds([], [1])
    with pytest.raises(ConfigError, match="no run named 'evit'"):
        seeds.add_seeds(["evit"], [1])
    seeds.add_seeds(["vit"], [1])
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 1}", "seed: 4}"))
    with pytest.raises(ConfigError, match="vit-seed1 is not vit with seed 1"):
        seeds.add_seeds(["vit"], [1])


def test_a_preset_named_again_keeps_its_seeds(experiment):
    shutil.copy("presets/imagenet.yaml", "params.yaml")
    seeds.add_seeds(["e-vit-s"], [1])
    with_seed = Path("params.yaml").read_text()
    preset.run("imagenet")
    assert Path("params.yaml").read_text() == with_seed
    preset.run("imagenet", "/elsewhere")  # nothing of one's own is lost by another source
    assert config.load_experiment().data.source == "/elsewhere"


def test_a_job_copies_code_and_keeps_results(tmp_path, root):
    place = tmp_path / "study"
    place.mkdir()
    job.copy_code(root, place)
    (place / "outputs").mkdir()
    (place / "outputs" / "kept").touch()
    (place / "flopeq" / "of_an_older_version.py").touch()
    job.copy_code(root, place)
    assert (place / "outputs" / "kept").exists()
    assert not (place / "flopeq" / "of_an_older_version.py").exists()  # it could still be imported
    assert (place / "stages" / "repro.py").read_bytes() == (root / "stages" / "repro.py").read_bytes()
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    stages = subprocess.check_output(command, cwd=place, text=True)
    assert "train@e-vit" in stages.split()


def test_a_folder_has_one_job_at_a_time(tmp_path, root):
    held = locks.acquire_lock(tmp_path / ".job", "")
    done = subprocess.run(
        [sys.executable, "-m", "stages.job", str(tmp_path), "check"], cwd=root, text=True, capture_output=True
    )
    os.close(held)
    assert done.returncode == 2 and "is already in use by process" in done.stderr


def test_an_unknown_stage_is_named_before_a_job_touches_its_folder(tmp_path):
    with pytest.raises(ConfigError, match="no stage named 'reproduce'; known: .*repro"):
        job.run(str(tmp_path / "study"), "reproduce")
    assert not (tmp_path / "study").exists()


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
    (folder / "params.yaml").write_text(dump_yaml(params))
    return folder


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
    assert "Running stage 'train@" not in done.stdout  # DVC took them over as they were
    for name in ("vit", "e-vit"):
        metrics = json.loads((place / "outputs" / name / "metrics.json").read_text())
        assert metrics["val/top1_pct"] > 10
        assert (place / "outputs" / name / "weights.safetensors").exists()
    assert not (home / "outputs").exists()
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
    for _ in range(2):
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
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
