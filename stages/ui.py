"""Prints the address of the runs in the MLflow UI: `python -m stages.ui [PORT]`; `make ui` starts it there."""

from __future__ import annotations

from stages import load_experiment, run_stage


def run(port: str = "5000") -> None:
    from pipeline import track

    url, _ = track.ui_urls(load_experiment(uses_ray=False), [])
    local = f"http://127.0.0.1:{port}"
    print(
        f"the runs: {url.replace(track.LOCAL_UI_URL, local)}"
        if url
        else f"no runs are tracked yet: {local} will be empty"
    )


if __name__ == "__main__":
    run_stage(run)
