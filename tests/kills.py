"""Kill short runs with SIGKILL at random moments, resume them, and compare what they leave with an unbroken run.

    python tests/kills.py --kills 50

Every other kill waits for a checkpoint to be half written. The training process is forked from one that has imported
everything, so that a life lasts seconds. `tests/test_kills.py` runs a few of these.
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from dr2seg_lib import runs, training

CONFIG = training.TrainConfig(steps=5, prompts=2, samples=2, max_new_tokens=12, eval_samples=0, rank=4, alpha=4, checkpoint_every=1, record=1)


def live(folder: Path) -> int: # pid
    "A process that trains the run in `folder`, from its last checkpoint if there is one."
    sys.stdout.flush()
    if pid := os.fork(): return pid
    try: # the child; nothing of it may return into the parent's code
        os.environ["DR2SEG_WATCHED"] = "1" # no bar of its own
        torch.set_num_threads(1)
        training.train(CONFIG, folder, resume=(folder/"run.json").exists())
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def left(folder: Path) -> tuple: # metrics without seconds, rollouts, files of the last checkpoint
    "What must be equal, byte for byte."
    rows = [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in runs.read_jsonl(folder/"metrics.jsonl")]
    last = runs.latest_checkpoint(folder)
    return rows, (folder/"rollouts.jsonl").read_bytes(), {p.name: p.read_bytes() for p in last.iterdir() if p.suffix in (".safetensors", ".pt")}


def kill(folder: Path, rng: random.Random, in_checkpoint: bool, life: float) -> bool: # False: it was done before
    "Let the run live a while and kill it."
    pid, began, wait = live(folder), time.time(), rng.uniform(0, life)
    part = folder/"checkpoints"/".part"
    while True:
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert code == 0, f"{folder}: the run ended with {code}"
            return False
        if time.time() - began > wait and (not in_checkpoint or part.exists()): break
        time.sleep(0.0005 if in_checkpoint else 0.01)
    if in_checkpoint: time.sleep(rng.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def trial(kills: int, root: Path, seed: int = 0, say=lambda text: None) -> dict: # counts
    "Kill until `kills` kills have happened; every run that reaches its end is compared."
    rng, began = random.Random(seed), time.time()
    whole = root/"whole"
    assert os.waitpid(live(whole), 0)[1] == 0
    want, life = left(whole), time.time() - began
    counts = dict(kills=0, in_checkpoint=0, failed_status=0, runs=0)
    while counts["kills"] < kills:
        folder, counts["runs"] = root/f"run-{counts['runs']}", counts["runs"] + 1
        for _ in range(rng.randint(1, 4)): # lives of this run that end by a kill
            in_checkpoint = bool(counts["kills"] % 2)
            if counts["kills"] == kills or not kill(folder, rng, in_checkpoint, life * .8): break
            counts["kills"] += 1
            counts["in_checkpoint"] += in_checkpoint
            if (folder/"run.json").exists():
                assert runs.status(folder) == "failed", f"{folder}: a killed run reads {runs.status(folder)}"
                counts["failed_status"] += 1
        if not (folder/"run.json").exists() or runs.status(folder) != "done":
            assert os.waitpid(live(folder), 0)[1] == 0, f"{folder}: the run cannot be resumed"
        got = left(folder)
        for name, a, b in zip(("metrics.jsonl", "rollouts.jsonl", "checkpoint"), got, want): assert a == b, f"{folder}: {name} differs from the unbroken run's"
        assert runs.status(folder) == "done"
        say(f"{counts['kills']:3} kills, {counts['runs']} runs, all equal to the unbroken one")
    return counts


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50); p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as root: print(json.dumps(trial(args.kills, Path(root), args.seed, lambda text: print(text, flush=True))))


if __name__ == "__main__": main()
