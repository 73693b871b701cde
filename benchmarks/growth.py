"""How a step's seconds and memory grow with each of its four sizes: slopes and a picture."""

import argparse
import math
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from dr2seg_lib.viewing.style import FIGURE_STYLE, MUTED

BASE = dict(prompts=1, samples=8, answer=32, side=560)
FACTORS = {
    "answers a prompt": ("samples", (2, 8, 32)),
    "image tokens": ("side", (280, 560, 840, 1400)),
    "tokens an answer": ("answer", (16, 64, 256)),
    "prompts": ("prompts", (1, 2, 4)),
}
TINY = {
    "answers a prompt": ("samples", (2, 4)),
    "image tokens": ("side", (112, 224)),
    "tokens an answer": ("answer", (4, 8)),
    "prompts": ("prompts", (1, 2)),
}
MEASURES = dict(step="seconds a step", mib="memory of a step, MiB")
NAMES = dict(trl="TRL", ours="this workbench")
COLOURS = dict(trl="#c6760b", ours="#4f70f0")


def grow(args, alone) -> list[dict]:  # alone: (engine, case) -> its figures
    "One factor at a time, both engines; a size that belongs to several factors is measured once."
    base = dict(samples=2, prompts=1, answer=4, side=112) if args.tiny else BASE
    known, rows = {}, []
    for factor, (field, values) in (TINY if args.tiny else FACTORS).items():
        for value in values:
            size = base | {field: value}
            key = tuple(size.values())
            case = argparse.Namespace(**vars(args) | size)
            known[key] = known.get(key) or {name: alone(name, case) for name in ("ours", "trl")}
            shown = (value // 28) ** 2 if field == "side" else value
            rows.append(dict(factor=factor, value=shown, **known[key]))
            print(rows[-1], flush=True)
    return rows


def rate(before: tuple, behind: tuple) -> float:
    "The slope between two points (value, figure), both axes logarithmic."
    (v, y), (w, z) = before, behind
    return round(math.log(z / y) / math.log(w / v), 2)


def slopes(rows: list[dict]) -> dict:  # {factor: {measure: {engine: whole, between}}}
    "The fitted exponent of each curve, and that between neighbours, which says where it bends."
    out = {}
    for factor in dict.fromkeys(r["factor"] for r in rows):
        some = [r for r in rows if r["factor"] == factor]
        for measure in MEASURES:
            for name in NAMES:
                points = [(r["value"], max(r[name][measure], 0.01)) for r in some]
                fitted = np.polyfit(*np.log(np.array(points, float)).T, 1)[0]
                between = [rate(*pair) for pair in pairwise(points)]
                place = out.setdefault(factor, {}).setdefault(measure, {})
                place[name] = dict(whole=round(float(fitted), 2), between=between)
    return out


def draw_panel(ax, rows: list[dict], measure: str, fitted: dict):
    "Both engines over the values of one factor, how many times less ours takes, and the slopes."
    values = [r["value"] for r in rows]
    for name, height in dict(trl=0.12, ours=0.03).items():
        figures = [r[name][measure] for r in rows]
        ax.plot(values, figures, "o-", ms=4.5, color=COLOURS[name], label=NAMES[name])
        text = f"slope {fitted[name]['whole']:.2f}"
        place = dict(transform=ax.transAxes, ha="right", fontsize=7.5)
        ax.text(0.98, height, text, color=COLOURS[name], **place)
    for r in rows:
        place = dict(xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7.5)
        times = r["trl"][measure] / max(r["ours"][measure], 0.01)
        ax.annotate(f"{times:.1f}×", (r["value"], r["trl"][measure]), **place)
    ax.set(xscale="log", yscale="log")
    ax.minorticks_off()
    ax.margins(x=0.14)
    ax.set_xticks(values, map(str, values))


def set_range(ax, rows: list[dict], measure: str):
    "A whole decade more below, where the slopes stand, and plain numbers."
    figures = [r[name][measure] for r in rows for name in NAMES]
    ax.set_ylim(max(min(figures), 0.01) / 4, max(figures) * 2.2)
    low, high = (math.log10(y) for y in ax.get_ylim())
    ticks = [10.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
    ax.set_yticks(ticks, [f"{t:,g}" for t in ticks])


def draw(rows: list[dict], fitted: dict, path: Path):
    "A row of panels for seconds, a row for memory, a column for each factor."
    factors = list(fitted)
    with plt.rc_context(FIGURE_STYLE):
        options = dict(figsize=(2.9 * len(factors), 5.4), layout="constrained", sharey="row")
        fig, axes = plt.subplots(len(MEASURES), len(factors), **options)
        for line, measure in zip(axes, MEASURES):
            for ax, factor in zip(line, factors):
                some = [r for r in rows if r["factor"] == factor]
                draw_panel(ax, some, measure, fitted[factor][measure])
            set_range(line[0], rows, measure)
            line[0].set_title(MEASURES[measure], color=MUTED)
        for ax, factor in zip(axes[-1], factors):
            ax.set_xlabel(factor)
        axes[0, 0].legend(loc="upper left", labelcolor="linecolor")
        fig.savefig(path, dpi=150)
        plt.close(fig)
