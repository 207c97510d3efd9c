"""The measurement protocol of throughput. No test depends on the speed of the machine."""

from __future__ import annotations

import logging
import time

import pytest
import torch
from torch import nn

from flopeq import hardware
from flopeq.hardware import can_compile
from flopeq.measure.throughput import (
    MIB,
    PAPER,
    ModelOutOfMemoryError,
    Protocol,
    Throughput,
    is_out_of_memory,
    measure_throughput_if_fits,
    protocol_for,
    throughput,
    throughput_ratio,
)


class Recorder(nn.Module):
    """Appends its name to a shared list at every pass, and sleeps for `pause_s`."""

    def __init__(self, name: str, passes: list[str], pause_s: float = 0.0) -> None:
        super().__init__()
        self.name, self.passes, self.pause_s = name, passes, pause_s
        self.seen: dict[str, object] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes.append(self.name)
        time.sleep(self.pause_s)
        self.seen = {
            "shape": tuple(images.shape),
            "training": self.training,
            "grad": torch.is_grad_enabled(),
            "autocast": torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        }
        return images


def measure(models, **changes):
    """Measures the models eagerly on the CPU."""
    protocol = {"batch_size": 2, "warmup": 1, "runs": 3, "dtype": torch.float32, "compile": False}
    return throughput(models, image_size=(3, 4, 4), device="cpu", **(protocol | changes))


def make_result(*seconds: float, batch_size: int = 6) -> Throughput:
    return Throughput("cpu", "float32", batch_size, False, seconds, None)


def test_timed_passes_alternate_over_the_models():
    passes: list[str] = []
    measure({name: Recorder(name, passes) for name in "ab"})
    assert passes == ["a"] * 2 + ["b"] * 2 + ["a", "b"] * 3


def test_passes_see_the_batch_in_evaluation_mode_without_gradients():
    model = Recorder("a", [])
    [result] = measure({"a": model}).values()
    assert model.seen == {"shape": (2, 3, 4, 4), "training": False, "grad": False, "autocast": None}
    assert (result.device, result.dtype, result.batch_size, result.runs) == ("cpu", "float32", 2, 3)
    assert result.peak_mem_mb is None and not result.compiled


def test_a_lower_precision_is_autocast():
    model = Recorder("a", [])
    [result] = measure({"a": model}, dtype=torch.bfloat16).values()
    assert model.seen["autocast"] == torch.bfloat16
    assert result.dtype == "bfloat16"


def test_the_slower_model_is_found():
    passes: list[str] = []
    results = measure({"slow": Recorder("slow", passes, 0.02), "fast": Recorder("fast", passes, 0.005)})
    assert throughput_ratio(model=results["fast"], baseline=results["slow"]) > 2
    assert results["slow"].img_per_s < 2 / 0.02


def test_figures_are_medians_of_the_passes():
    result = make_result(1.0, 2.0, 3.0, 4.0, 100.0)
    assert result.img_per_s == 2.0
    assert result.img_per_s_quartiles == (1.5, 3.0)
    assert make_result(2.0).img_per_s_quartiles == (3.0, 3.0)


def test_throughput_ratio_is_the_median_over_neighbouring_passes():
    # The machine is three times slower in the last pair of passes, which must not change the ratio.
    assert throughput_ratio(model=make_result(1.0, 1.0, 3.0), baseline=make_result(2.0, 2.0, 6.0)) == 2.0


def test_without_a_compiler_models_run_eager_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(hardware.shutil, "which", lambda name: None)
    assert not can_compile("cpu")
    with caplog.at_level(logging.WARNING):
        [result] = measure({"a": Recorder("a", [])}, compile=True).values()
    assert not result.compiled
    assert "C++ compiler" in caplog.text


@pytest.mark.skipif(not can_compile("cpu"), reason="needs a C++ compiler")
def test_many_models_of_one_class_are_all_compiled():
    counter = {}

    def count(graph, example_inputs):
        counter["graphs"] = counter.get("graphs", 0) + 1
        return graph.forward

    models = {str(width): nn.Sequential(nn.Conv2d(3, width, 1), nn.ReLU()) for width in range(1, 13)}
    compile_with_inductor = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda model, mode: compile_with_inductor(model, backend=count))
        results = measure(models, compile=True)
    assert all(result.compiled for result in results.values())
    assert counter["graphs"] == len(models)


def test_the_protocol_on_a_gpu_is_the_papers():
    assert protocol_for("cuda") is PAPER
    assert (PAPER.batch_size, PAPER.warmup, PAPER.runs, PAPER.dtype) == (64, 10, 100, torch.float16)
    assert protocol_for("cpu").dtype == torch.float32


def test_a_training_step_moves_the_weights_and_leaves_no_gradients():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 3))
    before = model[2].weight.detach().clone()
    [result] = measure({"a": model}, train=True).values()
    assert model.training and not torch.equal(model[2].weight, before)
    assert model[2].weight.grad is None
    assert result.runs == 3 and result.first_pass_s is None


def test_progress_is_reported_between_passes_only():
    updates: list[tuple[str, int, int]] = []
    measure({name: Recorder(name, []) for name in "ab"}, on_progress=lambda *update: updates.append(update))
    assert updates == [("a", 0, 10), ("b", 2, 10)] + [(name, 4 + i, 10) for i, name in enumerate("ababab")]


class LimitedMemoryModel(nn.Module):
    """Raises an out-of-memory error while more than `room` instances exist."""

    alive = 0
    room = 1

    def __init__(self) -> None:
        super().__init__()
        LimitedMemoryModel.alive += 1

    def __del__(self) -> None:
        LimitedMemoryModel.alive -= 1

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if LimitedMemoryModel.alive > LimitedMemoryModel.room:
            raise torch.OutOfMemoryError
        return images


@pytest.mark.parametrize("room, alternating, fits", [(2, True, True), (1, False, True), (0, False, False)])
def test_models_that_do_not_fit_together_are_measured_alone(room, alternating, fits, monkeypatch):
    monkeypatch.setattr(LimitedMemoryModel, "room", room)
    protocol = Protocol(batch_size=2, warmup=0, runs=2, dtype=torch.float32, compile=False)
    results, alternated = measure_throughput_if_fits(
        {"a": LimitedMemoryModel, "b": LimitedMemoryModel}, image_size=(3, 4, 4), protocol=protocol, device="cpu"
    )
    assert alternated == alternating
    assert [result is not None for result in results.values()] == 2 * [fits]
    assert LimitedMemoryModel.alive == 0


def test_out_of_memory_names_the_model_and_other_errors_pass_through():
    class Broken(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")

    with pytest.raises(ModelOutOfMemoryError, match="b does not fit into memory: use a smaller batch"):
        measure({"a": Recorder("a", []), "b": Broken()})
    assert is_out_of_memory(RuntimeError("x")) is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_peak_memory_is_that_of_one_model_alone():
    def models():
        return {name: nn.Sequential(nn.Flatten(), nn.Linear(48, 1024 * 1024)) for name in "ab"}

    protocol = {"image_size": (3, 4, 4), "batch_size": 2, "warmup": 1, "runs": 2, "device": "cuda"}
    results = throughput(models(), dtype=torch.float32, compile=False, **protocol)
    weights_mb = 49 * 1024 * 1024 * 4 / MIB
    for result in results.values():
        assert weights_mb < result.peak_mem_mb < 1.5 * weights_mb
