"""Measures weights in a file on the validation split: `python -m stages.evaluate_weights FILE MODEL [key=value ...]`.

FILE is a .safetensors of ours, or else a checkpoint as the paper's authors publish it; key=value are arguments of the
model that its weights do not show. The figures go to standard output as JSON, under their names in metrics.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import config
from pipeline.config import ConfigError
from stages import main


def run(*words: str) -> None:
    names = [word for word in words[1:] if "=" not in word]
    if len(names) != 1:
        raise ConfigError("usage: python -m stages.evaluate_weights FILE MODEL [key=value ...]")
    experiment = config.load()
    from flopeq import cli
    from pipeline import evaluate, verify

    verify.verify_changed(experiment.data.shards)
    (model_name,), model_args = cli.parse(list(words[1:]))
    print(json.dumps(evaluate.evaluate_weights(experiment, Path(words[0]), model_name, model_args), indent=2))


if __name__ == "__main__":
    main(run)
