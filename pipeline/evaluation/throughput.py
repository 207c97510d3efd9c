"""Forward throughput and peak memory of the networks of all runs, measured in alternation."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from flopeq.backends.malloc import keep_freed_memory
from flopeq.hardware import can_compile, device_name
from flopeq.measure.throughput import ProgressCallback, Protocol, Throughput, measure_throughput_if_fits
from pipeline.base.config import Experiment
from pipeline.evaluation.networks import build_network, select_device

_COLUMNS = ("device", "dtype", "batch_size", "img_per_s", "img_per_s_quartiles", "peak_mem_mb", "compiled")


def measure_networks(
    experiment: Experiment, comparisons: Sequence[Sequence[str]], *, num_classes: int
) -> dict[str, dict[str, Any]]:
    """Returns the measurement of each run, as throughput.json has it.

    Runs of one network, such as those of several seeds, share one measurement. The networks of a comparison alternate
    pass by pass, and are freed before those of the next one are built. If they do not fit the device's memory together,
    they are measured one by one, and one that does not fit even alone has no images per second.

    Args:
        comparisons: names of the runs that are compared with each other.
    """
    settings, side = experiment.throughput, experiment.data.image_size
    device = select_device(experiment)
    if device.type == "cpu":
        keep_freed_memory()
    protocol = Protocol(
        settings.batch_size, settings.warmup, settings.runs, getattr(torch, settings.dtype), settings.compile
    )
    groups = _distinct_networks(experiment, comparisons)
    on_progress = log_new_models("throughput", sum(map(len, groups)), settings.compile)
    measured = {}
    for group in groups:
        results, alternated = measure_throughput_if_fits(
            {names[0]: partial(_build, experiment, names[0], num_classes) for names in group},
            image_size=(3, side, side),
            protocol=protocol,
            device=device,
            on_progress=on_progress,
        )
        for names in group:
            measured |= dict.fromkeys(names, _row(results[names[0]], alternated, protocol, device))
    return measured


def log_new_models(stage: str, num_models: int, compile: bool) -> ProgressCallback:
    """Returns a callback that logs each model once, before its first pass, which compiles it if `compile` is set."""
    action = "compiling and warming up" if compile else "warming up"
    started: set[str] = set()

    def log_new_model(model: str, _num_done: int, _total: int) -> None:
        if model not in started:
            started.add(model)
            logging.info("%s: %s %s (%d of %d)", stage, action, model, len(started), num_models)

    return log_new_model


def _build(experiment: Experiment, run_name: str, num_classes: int) -> nn.Module:
    return build_network(experiment, run_name, num_classes=num_classes)


def _distinct_networks(experiment: Experiment, comparisons: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """Returns the comparisons with runs of one network together. Comparisons that share a network become one."""
    groups: list[dict[str, list[str]]] = []
    for comparison in comparisons:
        found: dict[str, list[str]] = {}
        for name in comparison:
            found.setdefault(_network_key(experiment, name), []).append(name)
        position = len(groups)
        for other in [group for group in groups if group.keys() & found.keys()]:
            position = min(position, groups.index(other))
            groups.remove(other)
            found = {key: [*other.get(key, ()), *found.get(key, ())] for key in {**other, **found}}
        groups.insert(position, found)
    return [list(group.values()) for group in groups]


def _network_key(experiment: Experiment, run_name: str) -> str:
    """Returns what the network of a run is built from."""
    run, symmetrized = experiment.run(run_name), experiment.symmetrized.get(run_name)
    wrapped: Mapping[str, Any] = {} if symmetrized is None else {"group": symmetrized.group, "how": symmetrized.how}
    return json.dumps([run.model, run.args, wrapped], sort_keys=True)


def _row(result: Throughput | None, alternated: bool, protocol: Protocol, device: torch.device) -> dict[str, Any]:
    if result is not None:
        row = {column: getattr(result, column) for column in _COLUMNS}
        return row | {"alternated": alternated, "pass_s": list(result.seconds)}
    return {
        **dict.fromkeys(_COLUMNS),
        "device": device_name(device),
        "dtype": str(protocol.dtype).removeprefix("torch."),
        "batch_size": protocol.batch_size,
        "compiled": protocol.compile and can_compile(device),
        "alternated": False,
        "pass_s": [],
    }
