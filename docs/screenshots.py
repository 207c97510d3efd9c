"""Pictures of a finished experiment for the documents: its report and its runs in MLflow, by a headless Chromium.

    python docs/screenshots.py FOLDER [--images docs/images] [--chromium PROGRAM]      # in the .venv of make

FOLDER is the repository's folder in which `make repro` has run. Look at the pictures before you commit them.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import yaml
from PIL import Image

MAX_BYTES = 150_000
# MLflow's own settings: the assistant stays closed, the side of model training is open.
STORED = {"mlflow.assistant.panelOpen_v1": "false", "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
          "mlflow.workflowType_v1": '"machine_learning"'}  # fmt: skip


VIEW = "mlflow.sharedViewState."  # the tag that holds the view that compares the runs


def main() -> None:
    """Takes all pictures; what is missing is said in one line on stderr, with exit code 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--chromium", default=shutil.which("chromium") or shutil.which("google-chrome"))
    asked = parser.parse_args()
    report, runs = asked.folder.resolve() / "reports" / "index.html", asked.folder.resolve() / "mlflow.db"
    missing = [str(path) for path in (report, runs) if not path.is_file()]
    if missing:
        sys.exit(f"error: no {' and no '.join(missing)}: run `make repro` there first")
    if not asked.chromium:
        sys.exit("error: no Chromium found: apt install chromium, or name one with --chromium")
    asked.images.mkdir(parents=True, exist_ok=True)

    experiment = yaml.safe_load((asked.folder / "params.yaml").read_text())["tracking"]["experiment"]
    with tempfile.TemporaryDirectory() as profile, mlflow_ui(runs) as address:
        browser = Browser(asked.chromium, profile)
        try:
            for name, url, width, height, wait_s in pages(report, address, experiment):
                image = asyncio.run(browser.shoot(url, width, height, wait_s, STORED if address in url else {}))
                save(image, asked.images / f"{name}.png")
        finally:
            browser.close()


def pages(report: Path, address: str, experiment: str) -> Iterator[tuple[str, str, int, int, float]]:
    """(name of the picture, URL, width, height, seconds until the page is drawn)."""
    yield "report", report.as_uri(), 1280, 1300, 3
    yield "report-phone", report.as_uri(), 400, 800, 3
    found = ask(address, "experiments/search", {"max_results": 1000})["experiments"]
    study = next(each for each in found if each["name"] == experiment)
    view = next(tag["key"].removeprefix(VIEW) for tag in study["tags"] if tag["key"].startswith(VIEW))
    here = f"{address}/#/experiments/{study['experiment_id']}/runs"
    yield "mlflow-runs", f"{here}?workflowType=machine_learning&viewStateShareKey={view}", 1400, 720, 12
    yield "mlflow-charts", f"{here}?workflowType=machine_learning&compareRunsMode=CHART", 1400, 1000, 20


class Browser:
    """A headless Chromium, steered over its DevTools protocol."""

    def __init__(self, program: str, profile: str) -> None:
        command = [
            program, "--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # Chromium refuses its sandbox to root
            f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        port_file = Path(profile) / "DevToolsActivePort"
        for _ in range(600):
            if port_file.is_file() and len(port_file.read_text().splitlines()) == 2:
                break
            if self.process.poll() is not None:
                sys.exit(f"error: {program} ended with {self.process.returncode}")
            time.sleep(0.1)
        self.address = f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"

    def close(self) -> None:
        """Ends the browser with all of its processes."""
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait()

    async def shoot(self, url: str, width: int, height: int, wait_s: float, stored: dict[str, str]) -> Image.Image:
        """One page, `wait_s` after it was opened; `stored` is what its origin finds in the browser's local storage."""
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{self.address}/json/new?about:blank") as answer:
                target = json.loads(await answer.text())["webSocketDebuggerUrl"]
            async with session.ws_connect(target, max_msg_size=0) as socket_:
                numbers = itertools.count(1)

                async def call(method: str, **params: object) -> dict:
                    number = next(numbers)
                    await socket_.send_json({"id": number, "method": method, "params": params})
                    while True:
                        message = await socket_.receive_json()
                        if message.get("id") == number:
                            return message["result"]

                await call(
                    "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
                )
                await call("Page.enable")
                script = f"Object.entries({json.dumps(stored)}).forEach(([key, value]) => localStorage[key] = value)"
                await call("Page.addScriptToEvaluateOnNewDocument", source=script if stored else "")
                await call("Page.navigate", url=url)
                await asyncio.sleep(wait_s)
                picture = await call("Page.captureScreenshot", format="png")
        return Image.open(io.BytesIO(base64.b64decode(picture["data"]))).convert("RGB")


def save(image: Image.Image, path: Path) -> None:
    """A PNG in as many colours as a small file allows."""
    for colors in (256, 128, 64, 32):
        image.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            break
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


@contextlib.contextmanager
def mlflow_ui(database: Path) -> Iterator[str]:
    """Serves the runs as `make ui` does, on a free port; yields the address and ends the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{database}"]  # fmt: skip
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = subprocess.Popen(
        command, cwd=database.parent, env=os.environ | quiet, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(180):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/health", timeout=10).close()
                break
            if server.poll() is not None:
                sys.exit(f"error: `mlflow ui` ended with {server.returncode}")
            time.sleep(1)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def ask(address: str, what: str, body: dict) -> dict:
    """One request to MLflow's API."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/{what}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
