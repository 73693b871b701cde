"""Kill runs at random moments of their whole life, resume them, and compare what they leave.

    python tests/kills.py --kills 200          # from the first evaluation to the report
    python tests/kills.py --sweep 6            # a sweep: its parent and a worker in turn
    python tests/kills.py --command-line 4     # `dr2seg run train`: command, kernel and all

Every kill is a SIGKILL. Every other one of the first kind waits for a half-written checkpoint.
The process is forked from one that has imported everything, so that a life lasts seconds.
`tests/runs/test_kills.py` runs a few of each.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.experiments import sweeps
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.status import read_progress, run_status
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import train
from dr2seg_lib.viewing.report import write_report

SMALL = dict(
    steps=5, prompts=2, samples=2, max_new_tokens=12, rank=4, alpha=4, checkpoint_every=1, record=1
)
CONFIG = TrainConfig(**SMALL, eval_samples=3, segmenter="grabcut")
ARMS = {
    f"run-{seed}": TrainConfig(**SMALL | dict(steps=3), eval_samples=0, seed=seed)
    for seed in (0, 1)
}
TIMES = "seconds", "tokens_per_second"


def train_and_report(folder: Path):
    train(CONFIG, folder, resume=(folder / "run.json").exists())
    write_report(folder)


def run_sweep(folder: Path):
    resumed = (folder / "run.json").exists()
    with Run.resume(folder, bar=False) if resumed else Run.create(folder, {}, bar=False) as run:
        failed = sweeps.run_sweep(run, ARMS)
        if failed:
            raise RuntimeError(f"{failed}")


def live(work, folder: Path) -> int:  # its pid
    "A process that works on the run in `folder`, from its last checkpoint if there is one."
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:  # the child; nothing of it may return into the parent's code
        os.setpgid(0, 0)  # with its own children, to be killed together in the end
        os.environ["DR2SEG_WATCHED"] = "1"  # no bar of its own
        torch.set_num_threads(1)
        work(folder)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def finish(work, folder: Path):
    code = os.waitpid(live(work, folder), 0)[1]
    assert code == 0, f"{folder}: the run cannot be resumed"


def without_times(rows: list) -> list:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def left(folder: Path) -> dict:  # what must be equal, byte for byte
    "Metrics without seconds, rollouts, evaluations, and the weights of the last checkpoint."
    last = latest_checkpoint(folder)
    files = [
        folder / name
        for name in (
            "rollouts.jsonl",
            "results.json",
            "predictions_before.jsonl",
            "predictions_after.jsonl",
        )
    ]
    files += [p for p in sorted(last.iterdir()) if p.suffix in (".safetensors", ".pt")]
    kept = {p.name: p.read_bytes() for p in files if p.exists()}
    return {
        "metrics.jsonl": without_times(read_jsonl(folder / "metrics.jsonl")),
        "checkpoint": last.name,
    } | kept


def compare(folder: Path, want: dict):
    got = left(folder)
    assert got.keys() == want.keys(), (
        f"{folder}: it has {sorted(got)}, the unbroken run {sorted(want)}"
    )
    for name, value in want.items():
        assert got[name] == value, f"{folder}: {name} differs from the unbroken run's"
    assert run_status(folder) == "done"


def kill(
    folder: Path, rng: random.Random, in_checkpoint: bool, life: float
) -> str | None:  # the stage; None: it was done
    "Let the run live a while and kill it."
    pid, began, wait = live(train_and_report, folder), time.time(), rng.uniform(0, life)
    part = folder / "checkpoints" / ".part"
    while True:
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert code == 0, f"{folder}: the run ended with {code}"
            return None
        if time.time() - began > wait and (not in_checkpoint or part.exists()):
            break
        time.sleep(0.0005 if in_checkpoint else 0.01)
    if in_checkpoint:
        time.sleep(rng.uniform(0, 0.01))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    stage = (read_progress(folder) or dict(stage="before the first sign"))["stage"]
    return "inside a checkpoint" if in_checkpoint and part.exists() else stage


def trial(kills: int, root: Path, seed: int = 0, say=lambda text: None) -> dict:  # counts by stage
    "Kill until `kills` kills have happened; every run that reaches its end is compared."
    rng, began, count, stages = random.Random(seed), time.time(), 0, {}
    finish(train_and_report, root / "whole")
    want, life, number = left(root / "whole"), time.time() - began, 0
    while count < kills:
        folder, number = root / f"run-{number}", number + 1
        for _ in range(rng.randint(1, 4)):  # lives of this run that end by a kill
            stage = kill(folder, rng, bool(count % 2), life) if count < kills else None
            if stage is None:
                break
            count += 1
            stages[stage] = stages.get(stage, 0) + 1
            if (folder / "run.json").exists():
                assert run_status(folder) in ("failed", "done"), (
                    f"{folder}: a killed run reads {run_status(folder)}"
                )
        if not (folder / "run.json").exists() or run_status(folder) != "done":
            finish(train_and_report, folder)
        compare(folder, want)
        say(f"{count:3} kills, {number} runs, all equal to the unbroken one")
    return dict(kills=count, runs=number, stages=stages)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(p) for p in found.stdout.split()]


def sweep_trial(kills: int, root: Path, seed: int = 0, say=lambda text: None) -> dict:
    "Kill the parent of a sweep, or one of its workers; resume; compare every run of it."
    rng = random.Random(seed)
    for name, config in ARMS.items():
        finish(lambda folder, config=config: train(config, folder), root / "whole" / name)
    hits = dict(parent=0, worker=0)
    for number in range(kills):
        folder, target = root / f"sweep-{number}", ("parent", "worker")[number % 2]
        pid = live(run_sweep, folder)
        while not any(folder.glob("*/metrics.jsonl")):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        victim = pid if target == "parent" else rng.choice([p for p in children_of(pid) or [pid]])
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
            hits[target] += 1
        os.waitpid(pid, 0)
        time.sleep(0.5)  # the workers die with their parent
        if run_status(folder) != "done":
            finish(run_sweep, folder)
        for name in ARMS:
            compare(folder / name, left(root / "whole" / name))
        say(f"sweep {number + 1}: {target} killed, every run equal to the unbroken one")
    return dict(sweeps=kills, killed=hits)


def command(folder: Path, resume: bool) -> subprocess.Popen:
    given = [
        x
        for name, value in (SMALL | dict(steps=3, eval_samples=2, segmenter="grabcut")).items()
        for x in ("-p", name, str(value))
    ]
    args = [
        Path(sys.executable).with_name("dr2seg"),
        "run",
        "train",
        *given,
        *(["--resume"] if resume else []),
        "--out",
        folder,
    ]
    return subprocess.Popen(
        args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def command_line_trial(kills: int, root: Path, seed: int = 0, say=lambda text: None) -> dict:
    "Kill the command with its kernel, at any moment from the first second to the report."
    rng, began = random.Random(seed), time.time()
    assert command(root / "whole", False).wait() == 0
    life, want, hits = time.time() - began, left(root / "whole"), 0
    for number in range(kills):
        folder = root / f"command-{number}"
        process = command(folder, False)
        time.sleep(rng.uniform(0.1 * life, life))
        hits += process.poll() is None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1)  # the kernel sees that its parent is gone
        begun = (folder / "run.json").exists()
        if not begun or run_status(folder) != "done":
            again = command(folder, begun)
            told = again.communicate()[1].decode()
            assert again.returncode == 0, f"{folder}: {told[-2000:]}"
        compare(folder, want)
        assert (folder / "report.html").stat().st_size > 1000
        say(f"command {number + 1}: equal to the unbroken one")
    return dict(commands=kills, killed=hits)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--sweep", type=int, default=0)
    parser.add_argument("--command-line", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = {}
    for work, n in (
        (trial, args.kills),
        (sweep_trial, args.sweep),
        (command_line_trial, args.command_line),
    ):
        with tempfile.TemporaryDirectory() as root:
            counts |= (
                work(n, Path(root), args.seed, lambda text: print(text, flush=True)) if n else {}
            )
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
