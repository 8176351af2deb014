"""Every repeat of every contestant as a dot, its median as a line, one panel per workload; losses by step and by time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from bench.report import measured

COLOUR = {"ours": "tab:blue", "limit": "tab:green", "peer": "tab:orange", "apart": "tab:gray"}


def save(workloads: Mapping[str, Mapping], path: Path) -> None:
    figure, panels = plt.subplots(1, len(workloads), figsize=(6.5 * len(workloads), 4.5), squeeze=False)
    for panel, (workload, result) in zip(panels[0], workloads.items(), strict=True):
        draw(panel, workload, result["contestants"])
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw(panel: Axes, workload: str, results: Mapping[str, Mapping]) -> None:
    names = [name for name, result in results.items() if measured(result)]
    for height, name in enumerate(reversed(names)):
        milliseconds = 1e3 * np.array(results[name]["seconds_per_step"])
        colour = COLOUR[results[name]["kind"]]
        panel.plot(milliseconds, np.full(len(milliseconds), height), ".", color=colour, alpha=0.5)
        panel.vlines(np.median(milliseconds), height - 0.35, height + 0.35, color=colour, linewidth=2)
    panel.set_yticks(range(len(names)), list(reversed(names)))
    panel.set_xlim(left=0)
    panel.set_xlabel("ms per step (lower is better)")
    panel.set_title(workload)


def save_curves(curves: Mapping[str, tuple[Sequence[float], float]], path: Path) -> None:
    """By contestant its losses and the seconds of a step: one panel over steps, one over time. Peers are dashed."""
    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(13, 4.5), sharey=True)
    for name, (losses, seconds) in curves.items():
        style = "--" if name.startswith("ddp") else "-"
        by_step.plot(losses, style, label=name, linewidth=1)
        by_time.plot(seconds * np.arange(1, len(losses) + 1), losses, style, label=name, linewidth=1)
    by_step.set_xlabel("step")
    by_time.set_xlabel("seconds")
    by_step.set_ylabel("loss")
    by_time.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
