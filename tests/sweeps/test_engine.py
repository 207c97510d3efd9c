"""Sweeps: what a space may hold, the same trials whatever happens on the way, and what comes of them."""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.base import config, schema
from pipeline.base.errors import ConfigError
from pipeline.base.yaml_files import dump_yaml, read_yaml
from pipeline.sweeps import analysis, search_space
from stages import prepare, resolve, shard
from tests.conftest import ray_tmpdir

ROOT = Path(__file__).resolve().parents[2]

SPACE = {"lr": {"log_uniform": [1e-4, 1e-2]}, "args.init_values": {"choice": [0.1, 1.0]}}


@pytest.fixture
def params() -> dict[str, Any]:
    return read_yaml(ROOT / "params.yaml")


@pytest.fixture
def load(tmp_path: Path, params: dict[str, Any]) -> Callable[..., config.Experiment]:
    """The committed experiment with other settings of its recipe sweep."""

    def load(**changes: Any) -> config.Experiment:
        changed = copy.deepcopy(params)
        changed["sweeps"]["recipe"].update(changes)
        (tmp_path / "params.yaml").write_text(dump_yaml(changed))
        return config.load_experiment(tmp_path / "params.yaml")

    return load


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"uniform": [1.0, 0.5]}, "lr: .*first number must be below the second"),
        ({"log_uniform": [0.0, 0.5]}, "lr: .*log_uniform needs numbers above 0"),
        ({"uniform": [0.0, 0.5], "choice": [1]}, "lr: .*exactly one of choice, uniform, log_uniform, integer"),
        ({"loguniform": [0.1, 0.5]}, "did you mean 'log_uniform'"),
    ],
)
def test_a_range_is_one_range(load: Callable[..., config.Experiment], values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(space={"lr": values})


@pytest.mark.parametrize(
    ("space_", "message"),
    [
        ({"learning_rate": {"uniform": [0.1, 0.2]}}, "learning_rate is neither a field of a recipe nor args"),
        ({"lr": {"uniform": [-1.0, 0.1]}}, "lr: -1.0 for run vit: lr: Input should be greater than 0"),
        ({"warmup_epochs": {"uniform": [0.5, 2.5]}}, "warmup_epochs: 0.5"),
        ({"auto_augment": {"choice": [None, "4a"]}}, "auto_augment: '4a'"),
        ({"args.head": {"choice": ["even", "even+abs_odd"]}}, "args.head: .* for run vit"),
        ({"args.init_value": {"choice": [0.1]}}, "takes no argument 'init_value'; did you mean 'init_values'"),
        ({"loss": {"choice": ["ce", "bce"]}}, "label_smoothing"),
        ({"epochs": {"integer": [1, 9]}}, "epochs is the same for all trials"),
    ],
)
def test_what_a_recipe_or_a_model_refuses_is_refused_before_anything_starts(
    load: Callable[..., config.Experiment], space_: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        search_space.check_search_space(load(space=space_))


def test_a_grid_has_ends(load: Callable[..., config.Experiment]) -> None:
    with pytest.raises(ConfigError, match="a grid needs choices or integers"):
        search_space.check_search_space(load(searcher="grid", trials=None))
    with pytest.raises(ConfigError, match="null for grid"):
        load(searcher="grid")


def test_a_sweep_names_runs_with_recipes_of_their_own(load: Callable[..., config.Experiment]) -> None:
    with pytest.raises(ConfigError, match="no run named 'vitt'; did you mean 'vit'"):
        load(runs=["vitt"], own_space={})
    with pytest.raises(ConfigError, match="vit-tuned has a recipe from a sweep"):
        load(runs=["vit-tuned"], own_space={})


@pytest.mark.parametrize("searcher", ["optuna", "random", "grid"])
def test_the_same_seed_and_space_suggest_the_same(searcher: str) -> None:
    of = {name: schema.Range(**values) for name, values in SPACE.items()}
    if searcher == "grid":
        of = {"warmup_epochs": schema.Range(integer=(0, 2)), "lr": schema.Range(choice=(1e-3, 2e-3))}

    def points(seed: int, rounds: tuple[int, ...] = (2, 2, 2)) -> list:
        suggested, seen = search_space.PointSampler(of, searcher, seed), []
        for count in rounds:
            asked = suggested.ask(count)
            suggested.tell([None if number else 50.0 + 1e3 * point["lr"] for number, point in enumerate(asked)])
            seen += asked
        return seen

    assert points(0) == points(0) and len(points(0)) == 6
    if searcher == "grid":
        assert len({tuple(point.items()) for point in points(0)}) == 6 and len(points(0, (4, 4))) == 6
    else:
        assert points(0) != points(1)


def test_importance_finds_the_field_that_matters() -> None:
    of = {name: schema.Range(**values) for name, values in SPACE.items()}
    reached = [(point, 100 * point["lr"]) for point in search_space.PointSampler(of, "random", 0).ask(24)]
    found = search_space.param_importances(of, reached)
    assert next(iter(found)) == "lr" and sum(found.values()) == pytest.approx(1)
    assert search_space.param_importances(of, reached[:1]) == {}


def test_pareto_front_holds_undominated_points() -> None:
    points = [(1.0, 80.0), (2.0, 90.0), (2.0, 85.0), (3.0, 90.0), (4.0, 95.0)]
    assert analysis.pareto_front(points) == [0, 1, 4]
    assert analysis.pareto_front([(1.0, 80.0), (1.0, 80.0)]) == [0, 1]


def test_a_gain_within_the_seed_spread_is_not_reported() -> None:
    assert analysis.beyond_spread([91.0, 92.0], [90.0, 90.5])
    assert not analysis.beyond_spread([91.0, 92.0], [90.0, 91.5])
    assert not analysis.beyond_spread([91.0], [90.0])


def test_early_stopping_keeps_one_in_so_many() -> None:
    from pipeline.sweeps import engine

    asha = schema.AshaParams(grace_epochs=2, reduction_factor=3)
    assert list(engine.rungs(asha, 18)) == [2, 6]
    assert engine.survives_rung(1.0, [9.0, 9.0], 3)  # too few to compare with
    assert engine.survives_rung(9.0, [1.0, 5.0, 9.0], 3) and not engine.survives_rung(4.0, [1.0, 5.0, 9.0], 3)


def test_an_override_makes_a_recipe_and_changes_the_models_arguments(
    tmp_path: Path, load: Callable[..., config.Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="sweeps/recipe/e-vit/best.yaml, which does not exist"):
        load().recipe("e-vit-tuned")
    best = tmp_path / "sweeps/recipe/e-vit/best.yaml"
    best.parent.mkdir(parents=True)
    best.write_text("recipe: {lr: 0.004}\nargs: {head: even+abs_odd}\n")
    experiment = load()
    assert experiment.recipe("e-vit-tuned") == experiment.recipe("e-vit").model_copy(update={"lr": 0.004})
    assert experiment.run("e-vit-tuned").args == {**experiment.run("e-vit").args, "head": "even+abs_odd"}
    monkeypatch.chdir(tmp_path)
    resolve.run("e-vit-tuned")
    resolve.run("digits")
    written = read_yaml(Path("recipes/e-vit-tuned.yaml"))
    assert (written["recipe"]["lr"], written["args"]) == (0.004, {"head": "even+abs_odd"})
    before = Path("recipes/digits.yaml").read_text()
    best.write_text("recipe: {lr: 0.005}\n")
    resolve.run("digits")
    assert Path("recipes/digits.yaml").read_text() == before
    best.write_text("recipe: {lr: 0.0}\n")
    with pytest.raises(ConfigError, match="best.yaml: lr: Input should be greater than 0"):
        load()
    best.write_text("recipes: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match="recipes: unknown parameter; did you mean 'recipe'"):
        load()


def test_findings_report_an_empty_result() -> None:
    found: dict[str, Any] = {
        "own": {"top1_pct": 90.0},
        "best": {"top1_pct": 92.0, "is_own": False},
        "beyond_spread": False,
        "confirmed": {"start": [90.0, 91.0], "best": [90.5, 92.0], "seeds": [1, 2]},
    }
    assert analysis.describe_recipe_finding(found).endswith(
        "90.5 to 92.0% against 90.0 to 91.0%: nothing beyond the spread over seeds"
    )
    assert analysis.describe_recipe_finding({**found, "beyond_spread": True}).endswith(
        "a gain beyond the spread over seeds"
    )
    assert "nothing better than its own recipe" in analysis.describe_recipe_finding(
        {**found, "best": {"is_own": True, "top1_pct": 90.0}}
    )
    split = {
        "flop_budget": 0.8,
        "above": [],
        "alike": [1, 3],
        "best": {"k": 2, "top1": [90.0, 91.0], "flop_fraction": 0.7},
    }
    assert analysis.describe_split_finding(split).endswith("not told apart from k = 1, 3 by the spread over seeds")


def test_a_truncated_history_file_is_readable(tmp_path: Path) -> None:
    from pipeline.sweeps.trial import TrialDirectory

    folder = TrialDirectory(tmp_path)
    assert folder.load_history() == []
    for epoch in (0, 1):
        folder.append_epoch({"epoch": epoch, "val/top1_pct": 50.0})
    with folder.history_file.open("a") as file:
        file.write('{"epoch": 2, "val/to')
    assert [row["epoch"] for row in folder.load_history()] == [0, 1]
    folder.append_epoch({"epoch": 2, "val/top1_pct": 60.0})
    assert [row["epoch"] for row in folder.load_history()] == [0, 1, 2]


def trial_files(place: Path) -> dict[str, list[str]]:
    """Each trial's journal, without timings."""
    found = {}
    for path in sorted((place / "sweeps/trials/recipe").glob("*/epochs.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [(row["epoch"], row["val/top1_pct"]) for row in rows if "epoch" in row]
    return found


def table(place: Path) -> list[dict[str, str]]:
    """trials.csv without timings."""
    with (place / "sweeps/recipe/trials.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the digits' shards and a sweep of two small runs."""
    place = tmp_path_factory.mktemp("sweep")
    params = read_yaml(ROOT / "params.yaml")
    for run in params["models"].values():
        run["args"]["embed_dim"] = 32
    params["recipes"]["digits"] |= {"global_batch_size": 256, "mixup_group": 64}
    params["sweeps"]["recipe"] |= {
        "runs": ["vit"],
        "own_space": {},
        "trials": 3,
        "round": 1,
        "epochs": 3,
        "confirm_seeds": 1,
        "asha": {"grace_epochs": 1, "reduction_factor": 2},
    }
    params["sweeps"]["hybrid"] |= {"runs": []}
    (place / "params.yaml").write_text(dump_yaml(params))
    before = Path.cwd()
    os.chdir(place)
    try:
        prepare.run()
        shard.run()
    finally:
        os.chdir(before)
    return place


def start_sweep(place: Path, **variables: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.sweep_recipe"],
        cwd=place,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run_sweep(place: Path, **variables: str) -> str:
    output, _ = (process := start_sweep(place, **variables)).communicate(timeout=500)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def reference_outcome(digits: Path, running_cluster: dict[str, str]) -> list[dict[str, str]]:
    """The trials of a sweep that nothing interrupted."""
    run_sweep(digits, **running_cluster)
    return table(digits)


def copy_of(digits: Path, place: Path, recipe: dict[str, Any] | None = None, **changes: Any) -> Path:
    """Another folder with the same data and nothing swept; `changes` are of the sweep, `recipe` of what it varies."""
    place.mkdir(exist_ok=True)
    params = read_yaml(digits / "params.yaml")
    params["recipes"]["digits"] |= recipe or {}
    params["sweeps"]["recipe"] |= changes
    (place / "params.yaml").write_text(dump_yaml(params))
    (place / "data").symlink_to(digits / "data")
    return place


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[dict[str, str]]:
    """A Ray cluster of two cores that outlives its drivers; the variables that lead there."""
    code = (
        "import sys; from ray.cluster_utils import Cluster;"
        "args = {'num_cpus': 2, 'dashboard_port': None};"  # another cluster on this machine may have the usual port
        "nodes = Cluster(initialize_head=True, head_node_args=args); print('at', nodes.address, flush=True);"
        "sys.stdin.read(); nodes.shutdown()"
    )
    head = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": ray_tmpdir()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert head.stdout is not None and head.stdin is not None
    address = next(line.split()[1] for line in head.stdout if line.startswith("at "))
    yield {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": address, "HEAD": str(head.pid)}
    head.stdin.close()
    head.wait(timeout=60)
    head.stdout.close()


def assert_nothing_is_left(variables: dict[str, str]) -> None:
    """No placement group, no trial, every core free."""
    code = """
import sys, time, ray
ray.init(log_to_driver=False)
for _ in range(60):
    groups = [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
    if not groups and ray.available_resources().get("CPU") == 2:
        sys.exit()
    time.sleep(0.5)
sys.exit(f"left: {groups} {ray.available_resources()}")
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # Of all actors, Ray Train's coordinator is one for all jobs of a cluster, and stays.
    for title in ("ImplicitFunc", "TrainController", "RayTrainWorker"):
        assert not processes(variables["HEAD"], f"ray::{title}"), title


def processes(head: str, word: str) -> list[int]:
    """Processes below that one whose title has the word."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[path.name] = (path / "stat").read_text().rpartition(")")[2].split()[1]
            titles[path.name] = (path / "cmdline").read_text(errors="replace")

    def is_below(pid: str) -> bool:
        return pid in parents and (parents[pid] == head or is_below(parents[pid]))

    return [int(pid) for pid, title in titles.items() if word in title and is_below(pid)]


def wait_for_epochs(place: Path, process: subprocess.Popen, count: int) -> None:
    """Until so many epochs were trained in all."""
    until = time.monotonic() + 300
    while sum(map(len, trial_files(place).values())) < count:
        assert process.poll() is None and time.monotonic() < until, process.stdout and process.stdout.read()
        time.sleep(0.05)


def finish_with_one_killed(place: Path, cluster: dict[str, str], title: str, *, after: int) -> None:
    """A sweep, of which one process with that title is killed after so many epochs."""
    process = start_sweep(place, **cluster)
    wait_for_epochs(place, process, after)
    [victim, *_] = processes(cluster["HEAD"], title)
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output


def test_sigterm_ends_a_sweep_as_ctrl_c_does() -> None:
    from pipeline.sweeps import engine

    with pytest.raises(KeyboardInterrupt), engine._sigterm_as_sigint():
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.slow
def test_a_finished_sweep_is_not_trained_again_and_its_outcome_is_a_row(
    digits: Path, reference_outcome: list, running_cluster: dict[str, str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (digits / "sweeps/trials").rglob("epochs.jsonl")}
    output = run_sweep(digits, **running_cluster)
    assert {path: path.stat().st_mtime_ns for path in (digits / "sweeps/trials").rglob("epochs.jsonl")} == before
    assert table(digits) == reference_outcome and "further seed" in output
    assert [row["round"] for row in reference_outcome if row["confirms"] == "0"] == list("012")
    experiment = config.load_experiment(digits / "params.yaml")
    best = max(
        (row for row in reference_outcome if row["state"] == "finished" and row["confirms"] == "0"),
        key=lambda row: float(row["top1_pct"]),
    )
    assert experiment.recipe("vit-tuned").lr == float(best["lr"])


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_sweep_resumes_to_the_same_table(
    digits: Path, reference_outcome: list, running_cluster: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    place = copy_of(digits, tmp_path / "place")
    process = start_sweep(place, **running_cluster)
    wait_for_epochs(place, process, 4)
    process.send_signal(end)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert_nothing_is_left(running_cluster)
    interrupted = trial_files(place)
    run_sweep(place, **running_cluster)
    assert table(place) == reference_outcome
    ended = trial_files(place)
    for name, epochs in interrupted.items():
        assert ended[name][: len(epochs) - 1] == epochs[:-1]
    repeated = sum(len(epochs) - len(dict(epochs)) for epochs in ended.values())
    assert repeated <= 2  # of each running trial the epoch whose checkpoint was being written
    assert_nothing_is_left(running_cluster)


@pytest.mark.slow
def test_a_trial_whose_process_dies_goes_on(
    digits: Path, reference_outcome: list, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(digits, tmp_path / "place")
    finish_with_one_killed(place, running_cluster, "ray::ImplicitFunc", after=3)
    assert table(place) == reference_outcome
    assert_nothing_is_left(running_cluster)


@pytest.mark.slow
def test_trials_of_two_workers_are_ray_train_runs_and_survive_a_workers_death(
    digits: Path, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(digits, tmp_path / "place", workers=2, trials=2, asha=None, confirm_seeds=0)
    finish_with_one_killed(place, running_cluster, "ray::RayTrainWorker", after=2)
    assert [(row["state"], row["epochs"]) for row in table(place)] == [("finished", "3")] * 2
    assert_nothing_is_left(running_cluster)


@pytest.mark.slow
def test_a_trial_larger_than_the_cluster_is_refused_at_once(
    digits: Path, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(digits, tmp_path / "place", workers=1, cpus_per_worker=3)
    output, _ = (process := start_sweep(place, **running_cluster)).communicate(timeout=60)
    assert process.returncode == 2
    assert "a trial needs 1 x 3 CPUs, and the Ray cluster has 2 CPUs on 1 node" in output


@pytest.mark.slow
def test_a_diverged_and_a_failed_trial_are_recorded_and_the_sweep_goes_on(
    digits: Path, running_cluster: dict[str, str], tmp_path: Path
) -> None:
    place = copy_of(
        digits,
        tmp_path / "place",
        {"clip_grad_norm": None, "warmup_epochs": 0},
        searcher="grid",
        trials=None,
        epochs=2,
        asha=None,
        # The last is a network for other images than there are, which only a forward pass can tell.
        space={"lr": {"choice": [1e30, 1e-3]}, "args.img_size": {"choice": [32, 24]}},
    )
    output = run_sweep(place, **running_cluster)
    rows = {(row["lr"], row["args.img_size"]): row for row in table(place) if row["confirms"] == "0"}
    assert rows["0.001", "32"]["state"] == "finished"
    assert rows["1e+30", "32"]["state"] == "diverged" and "loss" in rows["1e+30", "32"]["message"]
    assert rows["0.001", "24"]["state"] == "failed" and "height (32)" in rows["0.001", "24"]["message"]
    assert "diverged" in output and "failed" in output
