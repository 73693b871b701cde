"A training on two machines, which here are two commands that meet in the run's folder."

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dr2seg_lib.core.files import read_json
from dr2seg_lib.runs.meeting import CALL
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.status import run_status
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import train

SMALL = dict(
    steps=3,
    segmenter="grabcut",
    lora=dict(rank=4, alpha=4),
    rollout=dict(questions_per_step=2, group_size=2, max_new_tokens=24),
    evaluation=dict(samples=3, every=0),
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(config_of(), tmp_path_factory.mktemp("alone") / "run")


def config_of(nodes: int = 1, checkpoint_every: int = 1, **values) -> TrainConfig:
    runtime = dict(nodes=nodes, checkpoint_every=checkpoint_every)
    return TrainConfig(**SMALL | dict(runtime=runtime) | values)


def join(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", "from dr2seg_lib.cli import main; main()", "join", folder]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def numbers(row: dict) -> dict:
    kept = {k: v for k, v in row.items() if isinstance(v, float) and k != "tokens_per_second"}
    return kept | row["terms"]


def assert_alike(run: Run, other: Run):
    assert run.status == other.status == "done"
    rows = [pytest.approx(numbers(row), abs=1e-5) for row in other.metrics()]
    assert [numbers(row) for row in run.metrics()] == rows
    after = [read_json(r.folder / "results.json")["after"]["gIoU"] for r in (run, other)]
    assert after[0] == pytest.approx(after[1], abs=1e-5)


@pytest.mark.slow
def test_two_machines_give_the_metrics_of_one(alone, tmp_path):
    folder = tmp_path / "run"
    second = join(folder)  # it may come first
    train(config_of(nodes=2), folder)
    assert second.wait() == 0, second.stderr.read()
    assert_alike(Run.open(folder), alone)
    assert not (folder / CALL).exists()
    assert Run.open(folder).info["parameters"]["runtime"]["nodes"] == 2


@pytest.mark.slow
def test_a_lost_machine_ends_the_run_in_a_sentence_and_one_goes_on(alone, tmp_path):
    folder = tmp_path / "run"
    with ThreadPoolExecutor(1) as pool:
        first, second = pool.submit(train, config_of(nodes=2), folder), join(folder)
        while not (folder / "checkpoints" / "step-000001").exists() and not first.done():
            time.sleep(0.05)
        for pid in and_below(second.pid):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="another process of the run ended, perhaps with"):
            first.result(timeout=120)  # it does not wait for a machine that is gone
    assert run_status(folder) == "failed"
    run = train(config_of(nodes=1), folder, resume=True)
    assert run.info["resumed"][0]["changed"] == {"runtime.nodes": [2, 1]}
    assert_alike(run, alone)


def and_below(pid: int) -> list[int]:
    "A process, and all that it has started."
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True).stdout
    parents = dict(map(int, line.split()) for line in listed.splitlines())
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found
