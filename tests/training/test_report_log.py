"""The workers' reports reach the driver, in order, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

from pipeline.training.report_log import follow_reports


def test_every_report_reaches_the_driver_in_order(tmp_path: Path) -> None:
    path, entries = tmp_path / "run" / "journal.jsonl", []
    with follow_reports(path, entries.append) as log:
        for epoch in range(3):
            log.after_report(None, [{"epoch": epoch}, {"epoch": -1}], None)
        log.after_exception(None, {1: RuntimeError("Ray's.\nthe disk is full. Pages more.")})
    assert entries == [{"epoch": 0}, {"epoch": 1}, {"epoch": 2}, {"failed": {"1": "the disk is full"}}]
    assert not path.exists()


def test_a_report_after_the_driver_has_ended_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with follow_reports(path, print) as log:
        pass
    log.after_report(None, [{"epoch": 0}], None)
    log.after_exception(None, {0: RuntimeError("gone")})
    assert not path.exists()
