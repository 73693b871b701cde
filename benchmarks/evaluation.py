"""Greedy evaluation on the embedded world: samples a second.

    python benchmarks/evaluation.py
    PYTHONPATH=OTHER_CHECKOUT python benchmarks/evaluation.py --out before    # an older checkout

The library's own `evaluate` on the first scenes of the test split: read the samples, answer
greedily, draw the masks, compare; and of that the answering alone. Only names that older checkouts
have are used: `load_data`, `load_policy`, `load_segmenter`, `METHODS`, `evaluate`,
`answer_greedily`. The result says which checkout was measured, and holds a digest of what it
answered, so that two results can be seen to be of the same work.
"""

import argparse
import hashlib
import json
import subprocess
import time
from pathlib import Path
from unittest.mock import patch

import torch
from measuring import RESULTS, machine, medians, write_result

import dr2seg_lib
from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.evaluation import evaluate as evaluation
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.models.loading import load_policy
from dr2seg_lib.segmenters.loading import load_segmenter


def revision() -> str:
    "The commit of the library that was imported; empty where there is none."
    folder = Path(dr2seg_lib.__file__).parent
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def digest(rows: list[dict]) -> str:
    "The same for the same answers."
    texts = json.dumps([row.get("text") for row in rows])
    return hashlib.sha256(texts.encode()).hexdigest()[:16]


class Stopwatch:
    "A function that adds up its seconds."

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        began = time.perf_counter()
        out = self.function(*args, **kwargs)
        self.seconds += time.perf_counter() - began
        return out


def measure(args) -> dict:
    "Median rates over the turns; the samples are drawn, and everything is loaded, beforehand."
    policy, segmenter = load_policy("embedded"), load_segmenter("embedded")
    prompt, limits = METHODS[args.method].prompt, (args.batch_size, args.answer)
    samples, turns = list(load_data("mini", "test", args.scenes)), []
    evaluation.evaluate(policy, segmenter, samples[: args.batch_size], prompt, *limits)  # warms up
    for _ in range(args.turns):
        answering, began = Stopwatch(evaluation.answer_greedily), time.perf_counter()
        with patch.object(evaluation, "answer_greedily", answering):
            summary, rows = evaluation.evaluate(policy, segmenter, samples, prompt, *limits)
        turns.append(dict(whole=time.perf_counter() - began, answering=answering.seconds))
        print(turns[-1], flush=True)
    seconds = medians(turns)
    rates = {k: round(len(samples) / v, 2) for k, v in seconds.items()}
    figures = {k: v for k, v in summary.items() if isinstance(v, int | float)}
    answers = digest(rows)
    return dict(samples_per_second=rates, seconds=seconds, answers=answers, summary=figures)


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--scenes", type=int, default=512)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--answer", type=int, default=256, help="tokens at most")
    p.add_argument("--method", default="dr2seg")
    p.add_argument("--turns", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=RESULTS, help="folder of evaluation.json")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    shape = {k: v for k, v in vars(args).items() if k not in ("out", "threads")}
    result = dict(machine=machine("transformers"), revision=revision(), shape=shape)
    write_result(args.out / "evaluation.json", result | measure(args))


if __name__ == "__main__":
    main()
