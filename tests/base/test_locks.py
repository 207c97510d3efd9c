"""Two processes do not write the same outputs, and what a dead one leaves stops nobody."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.base.errors import BusyError
from pipeline.base.locks import acquire_lock, hold_lock
from stages import repro

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.base.locks import hold_lock
with hold_lock(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_process_and_ends_with_it_however_it_ends(tmp_path, root):
    path = tmp_path / "folder" / "lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], cwd=root, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match=rf"the run vit is already in use by process {holder.pid} on .*, since"):
            acquire_lock(path, "the run vit")
        holder.send_signal(signal.SIGKILL)
    assert path.is_file()
    with hold_lock(path, "the run vit"):
        assert path.read_text().startswith(f"process {os.getpid()} on ")


def test_a_second_repro_in_a_folder_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without params.yaml
    message = f"{re.escape(str(tmp_path))} is already in use by process {os.getpid()} "
    with hold_lock(repro.LOCK, "this folder"), pytest.raises(BusyError, match=message):
        repro.run()


def test_a_run_is_trained_by_one_process(tmp_path, monkeypatch, root):
    from pipeline.base import config
    from pipeline.training import trainer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer.manifests, "Shards", lambda *args, **settings: type("Shards", (), {"num_classes": 10}))
    monkeypatch.setattr(trainer, "training_inputs", lambda configuration, shards: {"model": configuration["model"]})
    monkeypatch.setattr(trainer.cluster, "connect", lambda cpus: None)
    monkeypatch.setattr(trainer, "_use_gpu", lambda experiment: False)
    trained = []
    monkeypatch.setattr(trainer, "_train", lambda experiment, run_name, *args, **settings: trained.append(run_name))
    experiment = config.load_experiment(root / "params.yaml")
    with hold_lock(Path("outputs/vit/checkpoints/lock"), ""):  # whatever its configuration
        with pytest.raises(BusyError, match="the run vit in .* is already in use by process"):
            trainer.train_run(experiment, "vit")
        trainer.train_run(experiment, "e-vit")
    trainer.train_run(experiment, "vit")
    assert trained == ["e-vit", "vit"]
