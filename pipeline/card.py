"""A trained model's card: what it is, what it was trained on and how, what it reaches, and what it is for."""

from __future__ import annotations

from importlib.metadata import version

from pipeline.config import Experiment
from pipeline.render import render
from pipeline.report import Result
from pipeline.table import error

_EQUIVARIANCE = {
    "E": "Equivariant to horizontal mirroring from end to end, by construction: an image and its mirror image get the "
         "same prediction, up to rounding. What tells left from right, such as text, it cannot use.",
    "H": "A hybrid: its first blocks are equivariant to horizontal mirroring and the rest are not, so that an image "
         "and its mirror image may get different predictions.",
    "X": "None by construction: an image and its mirror image may get different predictions.",
    None: "None by construction.",
}
_FIGURES = {
    "val/top1_pct": ("top-1", "{:.1f} %".format),
    "val/top5_pct": ("top-5", "{:.1f} %".format),
    "val/ema_top1_pct": ("top-1, averaged weights", "{:.1f} %".format),
    "val/real_top1_pct": ("top-1, reassessed labels", "{:.1f} %".format),
    "val/flop_agreement_pct": ("same class for image and mirror image", "{:.1f} %".format),
    "equivariance/max_rel_error": ("largest relative change of the logits under mirroring", error),
    "complexity/params_m": ("parameters (M)", "{:.3g}".format),
    "complexity/gflops": ("GFLOPs per image, in the paper's convention", "{:.3g}".format),
    "complexity/gmacs": ("multiply-adds per image (G)", "{:.3g}".format),
    "perf/forward_img_per_s": ("forward throughput (images/s)", "{:,.0f}".format),
    "complexity/flop_ratio": ("FLOPs of its X over its own", "{:.2f}".format),
    "perf/throughput_ratio": ("throughput over that of its X", "{:.2f}".format),
}


def card(result: Result, experiment: Experiment) -> str:
    """Markdown, beginning with what model hubs read.

    Everything is of the experiment as it stands; what a stage is needed for to be known is left out.
    """
    told, numbers = experiment.resolved(result.run), result.numbers()
    figures = [(name, words(numbers[key])) for key, (name, words) in _FIGURES.items() if key in numbers]
    figures += [(f"{name}, top-1", f"{numbers[f'{name}/top1_pct']:.1f} %")
                for name in experiment.data.further_val if f"{name}/top1_pct" in numbers]
    return render(
        "card.md",
        result=result,
        args=", ".join(f"{key}={value!r}" for key, value in told["args"].items()),
        figures=figures,
        data=experiment.data,
        speed=result.speed,
        train=experiment.train,
        recipe={key: value for key, value in told["recipe"].items() if key != "name"},
        equivariance=_EQUIVARIANCE[result.variant],
        versions=", ".join(f"{name} {version(name)}" for name in ("torch", "timm")),
    )
