"""Compares a forward pass on a CPU with and without `keep_freed_memory`, one process each.

    python benchmarks/alone.py                             the S sizes, X and E
    python benchmarks/alone.py MODEL ... --batch-size 64

Two processes alternate pass by pass, compiled, in float32, without gradients. A page fault is a page that the system
clears and hands out again after it was returned. Times are medians; ratios are medians over neighbouring passes, with
quartiles.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import timm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flopeq.backends.malloc import keep_freed_memory
from flopeq.hardware import hardware_name
from flopeq.measure.throughput import forward_pass, quartiles, time_call
from flopeq.models.build import build

SMALL = ("deit3_small_patch16_224", "resmlp_24_224", "convnext_iso_small")
MODELS = [prefix + name for name in SMALL for prefix in ("", "flop_")]
WARMUP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=10, help="timed passes per process")
    args = parser.parse_args()
    print("| network | ms, given back | ms, kept | given back / kept | page faults, given back | kept |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for model in args.models:
        passes = measure_alternating(model, args.batch_size, args.runs)
        ratios = [slow / fast for (slow, _), (fast, _) in zip(*passes, strict=True)]
        low, high = quartiles(ratios)
        ms = [1e3 * statistics.median(seconds for seconds, _ in process) for process in passes]
        faults = [statistics.median(count for _, count in process) for process in passes]
        print(f"| {model} | {ms[0]:.0f} | {ms[1]:.0f} | {statistics.median(ratios):.2f} ({low:.2f} to {high:.2f}) "
              f"| {faults[0]:,.0f} | {faults[1]:,.0f} |", flush=True)  # fmt: skip
    print(f"\n{hardware_name('cpu')}, {torch.get_num_threads()} threads; float32, batch {args.batch_size}; "
          f"torch {torch.__version__}, timm {timm.__version__}.")  # fmt: skip


def measure_alternating(model: str, batch_size: int, runs: int) -> list[list[tuple[float, int]]]:
    """Seconds and page faults of each pass, of the process that gives memory back and of the one that keeps it."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for keep in (False, True):
        pipe, worker_pipe = context.Pipe()
        context.Process(target=work, args=(worker_pipe, model, batch_size, keep), daemon=True).start()
        worker_pipe.close()
        pipe.recv()  # waits for the warm-up before the other process starts
        pipes.append(pipe)
    passes: list[list[tuple[float, int]]] = [[], []]
    for _ in range(runs):
        for pipe, done in zip(pipes, passes, strict=True):
            pipe.send(True)
            done.append(pipe.recv())
    for pipe in pipes:
        pipe.send(False)
    return passes


def work(pipe: Connection, model: str, batch_size: int, keep: bool) -> None:
    """One process: a pass whenever it is asked for."""
    if keep:
        keep_freed_memory()
    network = build(model).eval()
    images_BCHW = torch.randn(batch_size, 3, 224, 224)
    run = forward_pass(torch.compile(network), images_BCHW, torch.float32)
    with torch.no_grad():
        network(images_BCHW[:1])
        for _ in range(WARMUP):
            run()
        pipe.send("warm")
        while pipe.recv():
            before = page_faults()
            seconds = time_call(run, images_BCHW.device)
            pipe.send((seconds, page_faults() - before))


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    main()
