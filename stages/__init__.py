"""The stages that DVC runs. A stage reads the parameters, makes one call into pipeline or flopeq, writes its outs."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.base.config import Experiment


def load_experiment(*, uses_ray: bool = True) -> Experiment:
    """Loads params.yaml, and checks what a stage needs around the folder before it computes for hours.

    Every stage that starts Ray or logs to MLflow loads the experiment here.

    Args:
        uses_ray: whether the stage uses a Ray cluster.
    Raises: ConfigError or ClusterError, each within 15 s.
    """
    from pipeline import cluster
    from pipeline.base import config, tracking_uri

    experiment = config.load_experiment()
    if uses_ray:
        cluster.check_ray()
    tracking_uri.check_tracking(experiment.tracking.experiment)
    return experiment


def run_stage(stage: Callable[..., object]) -> None:
    """Runs a stage: `if __name__ == "__main__": run_stage(run)` calls `run` with the command-line arguments.

    An error that pipeline or flopeq defines (ConfigError, ShardError, ClusterError) is a message for the user: it goes
    to stderr without a traceback, and the exit status is 2. Any other error is a bug and has its traceback.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # `stages.repro` has DVC, and so its stages, ignore it
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    from stages.inputs import unchanged_inputs

    try:
        with unchanged_inputs():
            stage(*sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("pipeline", "flopeq"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
