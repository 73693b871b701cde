"""What bounds a step at 8, 64 and 512 GPUs, on paper: nothing here was measured on a GPU.

dr2seg plan train --preset dr2seg_star --gpu h200 --gpus 8   # the counts; writes plan.json
python benchmarks/on_paper.py [plan.json]                    # the table of docs/performance.md
"""

import json
import sys
from pathlib import Path
from statistics import NormalDist

PLAN = Path(__file__).parent / "results" / "plan_dr2seg_star_h200.json"
QUESTIONS, GROUP = 2, 8  # a GPU, as the published 16 x 8 on 8 GPUs
MEMORY = 4.8e12 * 0.7  # B/s of an H200 that decoding reaches
WITHIN, BETWEEN = 450e9 * 0.6, 50e9 * 0.6  # B/s of a GPU to those of its machine, and beyond
HOP = 20e-6  # seconds a step of the ring takes at least
WRITTEN, READ = 10e9, 40e9  # B/s of the disk that all machines share


def longest(answers: int, mean: float, deviation: float) -> float:
    "Tokens of the longest of so many answers, which a step waits for (normal lengths)."
    return mean + deviation * NormalDist().inv_cdf(1 - 1 / (answers + 1))


def gradient_seconds(gpus: int, moved: float) -> float:
    "The sum of the adapter's gradient over all GPUs, in a ring."
    speed = WITHIN if gpus <= 8 else BETWEEN
    return 2 * moved * (gpus - 1) / gpus / speed + 2 * (gpus - 1) * HOP


def step_rows(plan: dict, gpus: int) -> tuple[dict, dict]:
    "A step by the own engine on all GPUs, and by servers on half of them."
    stages = {row["stage"]: row for row in plan["stages"]}
    passes = [stages["first"], stages["second"]]
    lengths = plan["asked"]["lengths"]
    wait = longest(gpus * QUESTIONS * GROUP, lengths["mean"], lengths["deviation"])
    tokens = 2 * wait  # in two passes
    learn = stages["reference"]["seconds"] + stages["update"]["seconds"]
    adapter = plan["trained_gib"] * 2**30
    own_token = sum(row["seconds"] for row in passes) / plan["decoding_steps"]
    own = dict(sampling=tokens * own_token, update=learn, gradient=gradient_seconds(gpus, adapter))
    # A server has twice the answers, reads its weights once for all of them, and waits for no host.
    weights = stages["first"]["holds_gib"]["weights"] * 2**30
    read = sum(row["terabytes"] for row in passes) * 1e12 / plan["decoding_steps"]
    token = (2 * read - weights) / MEMORY
    half = gpus // 2
    served = dict(
        sampling=tokens * token,
        update=2 * (learn + stages["reference"]["seconds"]),  # own statistics of what came back
        gradient=gradient_seconds(half, adapter),
        adapter=half * adapter / WRITTEN + half * adapter / READ,  # each process writes its own
        once=adapter / WRITTEN + half * adapter / READ,
    )
    return own, served


def table(plan: dict) -> str:
    "Markdown: a row for each number of GPUs and way to sample."
    lines = [
        "| GPUs | questions a step | sampled by | sampling | update | gradient "
        "| adapter to servers | step | bound by |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for gpus in 8, 64, 512:
        own, served = step_rows(plan, gpus)
        once = served.pop("once")
        for who, row in (("every GPU", own), ("servers on half", served)):
            times = [row.get(name) for name in ("sampling", "update", "gradient", "adapter")]
            cells = ["" if t is None else f"{t:.2f}" for t in times]
            if "adapter" in row:
                cells[3] += f" ({once:.2f})"
            cells += [f"{sum(row.values()):.1f}", max(row, key=row.get)]
            lines.append(f"| {gpus} | {gpus * QUESTIONS:,} | {who} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(*sys.argv[1:2] or [PLAN]).read_text())))
