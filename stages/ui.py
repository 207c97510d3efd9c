"""Says where the MLflow UI shows the runs side by side: `python -m stages.ui [PORT]`; `make ui` starts it there."""

from __future__ import annotations

from pipeline import config
from stages import main


def run(port: str = "5000") -> None:
    from pipeline import track

    url, _ = track.urls(config.load(), [])
    local = f"http://127.0.0.1:{port}"
    print(f"the runs: {url.replace(track.UI, local)}" if url else f"nothing is tracked yet: {local} will be empty")


if __name__ == "__main__":
    main(run)
