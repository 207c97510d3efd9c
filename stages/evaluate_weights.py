"""Evaluates a weights file on the validation split: `python -m stages.evaluate_weights FILE MODEL [key=value ...]`.

FILE is one of our .safetensors, or a checkpoint as the paper's authors publish it. key=value are model arguments that
cannot be inferred from the weights. The metrics go to standard output as JSON, under their names in metrics.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.base import config
from pipeline.base.errors import ConfigError
from stages import run_stage


def run(*words: str) -> None:
    names = [word for word in words[1:] if "=" not in word]
    if len(names) != 1:
        raise ConfigError("usage: python -m stages.evaluate_weights FILE MODEL [key=value ...]")
    experiment = config.load_experiment()
    from flopeq.cli import options
    from pipeline.evaluation import evaluate
    from pipeline.shards import verify

    verify.verify_changed(experiment.data.shards)
    (model_name,), model_args = options.parse_model_args(list(words[1:]))
    print(json.dumps(evaluate.evaluate_weights(experiment, Path(words[0]), model_name, model_args), indent=2))


if __name__ == "__main__":
    run_stage(run)
