"""The comparison of two revisions."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from pipeline.base.yaml_files import dump_yaml
from pipeline.reporting import revision_diff
from stages import compare as compare_stage
from tests.reporting.conftest import write_json


@pytest.fixture
def revisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with DVC and git: a revision without metrics, one with them, and other metrics in the workspace."""
    monkeypatch.chdir(tmp_path)
    for key in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{key}_NAME", "t")
        monkeypatch.setenv(f"GIT_{key}_EMAIL", "t@t")

    def git(*command: str) -> None:
        subprocess.run(["git", *command], check=True, capture_output=True)

    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").touch()
    git("init")
    Path("params.yaml").write_text(dump_yaml({"train": {"workers": 1, "amp": None}, "seed": 0}))
    git("add", ".")
    git("commit", "-m", "nothing measured")
    Path("reports").mkdir()
    write_json(Path("reports/metrics.json"), vit={"val/top1_pct": 98.0, "perf/share": 0.5}, gone={"val/top1_pct": 90.0})
    git("add", ".")
    git("commit", "-m", "measured")
    Path("params.yaml").write_text(dump_yaml({"train": {"workers": 2, "amp": None}, "seed": 0, "new": {"a": 1}}))
    write_json(Path("reports/metrics.json"), vit={"val/top1_pct": 98.5, "perf/share": 0.5}, more={"val/top1_pct": 97.0})
    return tmp_path


def test_comparison_shows_what_differs_between_revisions(revisions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    then, now = revision_diff.load_revision("HEAD"), revision_diff.load_revision(None)
    differences = [(d.run, d.name, d.before, d.after) for d in revision_diff.find_differences(then, now)]
    assert differences == [
        ("", "train.workers", 1, 2),
        ("", "new", None, {"a": 1}),
        ("vit", "val/top1_pct", 98.0, 98.5),
        ("more", "the run", None, {"val/top1_pct": 97.0}),
        ("gone", "the run", {"val/top1_pct": 90.0}, None),
    ]
    compared = revision_diff.build_comparison_table(then, now)
    assert compared.columns == ("run", "HEAD", "now", "change")
    assert compared.texts == [["vit", "98.0", "98.5", "+0.5"], ["more", "–", "97.0", "–"], ["gone", "90.0", "–", "–"]]
    compare_stage.run("HEAD")
    written = Path("reports/comparison.html").read_text()
    assert "Settings that differ" in written and "train.workers" in written and "+0.5" in written
    assert "val/top1_pct" in capsys.readouterr().out
    compare_stage.run(".", ".")
    assert "Nothing differs" in Path("reports/comparison.html").read_text()


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("nonsense", "'nonsense' is neither a revision"),
        ("HEAD~1", "HEAD~1 has no reports/metrics.json: commit dvc.lock"),
        (".dvc", "make repro"),
    ],
)
def test_comparison_says_what_it_misses(revisions: Path, where: str, words: str) -> None:
    with pytest.raises(revision_diff.CompareError, match=re.escape(words)):
        revision_diff.load_revision(where)
