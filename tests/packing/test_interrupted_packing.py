"""A killed run resumes, and Ray tasks write the same bytes as one process."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from pipeline.base.errors import SourceError
from pipeline.packing import shard_task
from tests.packing import layouts
from tests.packing.conftest import contents, modification_times, write_shards

KILLED = """
import sys, time
from pipeline.packing import pack, shard_task
kept = shard_task._existing_record
shard_task._existing_record = lambda task: (time.sleep(0.1), kept(task))[1]
pack.pack_source(sys.argv[1], sys.argv[2], images_per_shard=4, seed=0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("then", ["in process", "in tasks"])
def test_a_killed_run_resumes_to_the_same_bytes(images, root, tmp_path, then):
    source, out = layouts.archives(images, tmp_path / "source"), tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(out)], cwd=root) as process:
        while len(list((out / shard_task.RECORDS_DIR).glob("*.parquet"))) < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    # The last tar may lie there without its record, and is then written again.
    done = {name: at for name, at in modification_times(out).items() if shard_task.record_path(out, name).exists()}
    assert 3 <= len(done) < 7 and not (out / "manifest.json").exists()
    (out / "train-000004.tar.0a1b2c3d.partial").write_bytes(b"half a shard")
    manifest = write_shards(source, out, in_process=then == "in process")
    assert manifest == write_shards(source, tmp_path / "fresh", in_process=True)
    assert contents(out) == contents(tmp_path / "fresh")
    assert {name: modification_times(out)[name] for name in done} == done


@pytest.mark.slow
@pytest.mark.parametrize("cpus", [1, 3])
def test_any_number_of_ray_tasks_writes_the_same_bytes(root, tmp_path, cpus):
    images = layouts.images(issues=layouts.ISSUES + layouts.BAD_IMAGES)
    source = layouts.kaggle_zip(images, tmp_path / "source")
    script = (
        "import sys; from pipeline import cluster; from pipeline.packing import pack; cluster.connect(); import ray; "
        "pack.pack_source(*sys.argv[1:], images_per_shard=4, seed=0, on_bad_image='skip', in_process=False)"
    )
    start = f"import ray; ray.init('local', num_cpus={cpus}, include_dashboard=False, log_to_driver=False); "
    subprocess.run([sys.executable, "-c", start + script, source, tmp_path / "tasks"], cwd=root, check=True)
    write_shards(source, tmp_path / "here", on_bad_image="skip", in_process=True)
    assert contents(tmp_path / "tasks") == contents(tmp_path / "here")
    with pytest.raises(SourceError, match="3 of the images cannot be decoded"):
        write_shards(source, tmp_path / "tasks", in_process=True)
