"""The network of every run of the experiment, symmetrized runs included, with random weights or those of a training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import flopeq
from flopeq.models.build import ModelError, build
from pipeline.base.config import Experiment
from pipeline.base.errors import ConfigError
from pipeline.base.schema import SymmetrizedRun


def build_network(
    experiment: Experiment, run_name: str, *, num_classes: int, device: torch.device | str = "cpu"
) -> nn.Module:
    """Builds the untrained network of a run.

    Raises: ModelError for a model or an argument that does not exist, or a group that the network cannot have.
    """
    run = experiment.run(run_name)
    network = build(run.model, device=device, num_classes=num_classes, **run.args)
    symmetrized = experiment.symmetrized.get(run_name)
    return network if symmetrized is None else symmetrize_network(network, symmetrized)


def symmetrize_network(network: nn.Module, symmetrized: SymmetrizedRun) -> nn.Module:
    """Returns the network with invariant logits. Raises: ModelError for a group that does not exist."""
    try:
        return flopeq.symmetrize(network, symmetrized.group, how=symmetrized.how)
    except ValueError as error:
        raise ModelError(str(error)) from None


def load_trained_network(
    experiment: Experiment, run_name: str, file: str, *, num_classes: int, outputs: Path = Path("outputs")
) -> nn.Module:
    """Builds the network of a trained run with the weights in a file of its folder.

    Raises: ConfigError if there is no such file.
    """
    path = outputs / run_name / file
    if not path.is_file():
        raise ConfigError(f"{path} not found: run `dvc repro --force train@{run_name}`")
    run = experiment.run(run_name)
    model = build(run.model, num_classes=num_classes, **run.args)
    model.load_state_dict(load_file(path))
    return model


def select_device(experiment: Experiment) -> torch.device:
    """Returns this process's GPU, unless the experiment trains without or there is none; then, the CPU."""
    gpu = experiment.train.gpu is not False and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")
