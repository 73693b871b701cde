"""Figures that a change of shape must not change: five steps of the demo, 32 scenes evaluated.

    python tests/unchanged.py --write FILE     # before the change
    python tests/unchanged.py --check FILE     # after it, on the same machine: equal, to the bit

Machines differ in the last digits and a policy amplifies them, so no such file is committed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

TIMES = "seconds", "tokens_per_second"
TRAIN = [
    "train",
    "-p",
    "steps",
    "5",
    "-p",
    "evaluation.samples",
    "0",
    "-p",
    "optim.schedule",
    "constant",
]
EVALUATE = ["evaluate", "-p", "data.samples", "32"]


def run(arguments: list, out: Path):
    "One experiment by the command line, into `out`."
    command = [Path(sys.executable).with_name("dr2seg"), "run", *arguments, "--out", out]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def figures(folder: Path) -> dict:
    "What came out, without what a clock said."
    run(TRAIN, folder / "train")
    run(EVALUATE, folder / "evaluate")
    steps = [
        {k: v for k, v in row.items() if k not in TIMES}
        for row in lines(folder / "train/metrics.jsonl")
    ]
    return dict(steps=steps, predictions=lines(folder / "evaluate/predictions.jsonl"))


def differences(before, after, where: str = "") -> list[str]:
    "Where two records differ; what the later one has besides is no difference."
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            d for key in before for d in differences(before[key], after.get(key), f"{where}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            d
            for i, pair in enumerate(zip(before, after))
            for d in differences(*pair, f"{where}/{i}")
        ]
    return [] if before == after else [f"{where}: {before!r} became {after!r}"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--write", type=Path)
    way.add_argument("--check", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        now = figures(Path(folder))
    if arguments.write:
        arguments.write.write_text(json.dumps(now))
        return
    changed = differences(json.loads(arguments.check.read_text()), now)
    print("\n".join(changed[:20]) or "nothing changed")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
