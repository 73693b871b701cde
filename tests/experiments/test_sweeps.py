"Many runs in one: finished ones are skipped, a failing one is named and hurts no other."

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.experiments.local_workers import Job, LocalPool, find_answered
from dr2seg_lib.experiments.sweeps import arm_results, job_of, run_sweep
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.status import read_progress, run_status
from dr2seg_lib.training import both_ends
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import train
from dr2seg_lib.viewing.tables import arms_table

SMALL = dict(
    steps=1,
    prompts=1,
    samples=2,
    rank=4,
    alpha=4,
    eval_samples=2,
    max_new_tokens=40,
    segmenter="grabcut",
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    configs = {
        "vr-s0": TrainConfig(recipe="visionreasoner", **SMALL),
        "vr-s1": TrainConfig(recipe="visionreasoner", seed=1, **SMALL),
        "bad": TrainConfig(**SMALL | dict(model="no-such/model")),
    }
    with Run.create(tmp_path_factory.mktemp("sweep") / "run", {}, bar=False) as run:
        failed = run_sweep(run, configs, workers=2)
    return run, configs, failed


def test_every_arm_ran_and_the_broken_one_is_named(swept):
    run, _, failed = swept
    assert set(failed) == {"bad"}
    assert run_status(run.folder / "bad") == "failed"
    assert run_status(run.folder / "vr-s0") == run_status(run.folder / "vr-s1") == "done"


def test_table_of_the_arms(swept):
    run, _, _ = swept
    results = arm_results(run.folder, {"visionreasoner": ["vr-s0", "vr-s1"], "dr2seg": ["bad"]})
    assert [len(r) for r in results.values()] == [2, 0]
    table = arms_table(
        {"visionreasoner": [r["after"] for r in results["visionreasoner"]]},
        results["visionreasoner"][0]["before"],
    )
    tokens = [r["after"]["tokens"] for r in results["visionreasoner"]]
    assert len(table.rows) == 2
    assert table.rows[1][2].startswith(f"{sum(tokens) / 2:.1f}")


def test_done_runs_are_left_alone(swept):
    run, configs, _ = swept
    before = read_json(run.folder / "vr-s0/run.json")
    again = Run.resume(run.folder, bar=False)
    with again:
        run_sweep(again, {"vr-s0": configs["vr-s0"]})
    assert read_json(run.folder / "vr-s0/run.json") == before


def test_the_start_is_asked_once(swept, tmp_path, monkeypatch):
    "A later seed takes the answers of the first; they are those that it would have given."
    run, configs, _ = swept
    asked, answer = [], both_ends.answer_held_out

    def noted(*args):
        asked.append(args[6])
        return answer(*args)

    monkeypatch.setattr(both_ends, "answer_held_out", noted)
    third = configs["vr-s0"].model_copy(update=dict(seed=2))
    folders = {name: run.folder / name for name in configs} | dict(third=tmp_path / "third")
    alike = find_answered(job_of(configs | dict(third=third), folders, "third").alike)
    assert alike in (run.folder / "vr-s0", run.folder / "vr-s1")
    train(third, tmp_path / "third", alike=alike)
    assert asked == ["after"]
    taken, own = (
        read_jsonl(folder / "predictions_before.jsonl")
        for folder in (tmp_path / "third", run.folder / "vr-s1")
    )
    assert [row["text"] for row in taken] == [row["text"] for row in own]
    other = third.model_copy(update=dict(segmenter="embedded"))
    folders["other"] = tmp_path / "other"
    assert not job_of(configs | dict(third=third, other=other), folders, "other").alike


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks into /proc")
def test_each_run_sees_a_gpu_of_its_own(tmp_path, monkeypatch):
    "Two of the three GPUs that a scheduler has given, to two processes; the third waits."
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3,7")
    pool, seen = LocalPool(workers=2), []
    for name in "ab":
        worker = pool.start(Job(TrainConfig(model="no-such/model", **SMALL), tmp_path / name))
        seen += inherited_gpus(worker.process.pid)
    pool.close()
    assert seen == ["CUDA_VISIBLE_DEVICES=5", "CUDA_VISIBLE_DEVICES=3"]


def inherited_gpus(pid: int) -> list[str]:
    "What the environment of a process says of GPUs, once it has one of its own."
    found = []
    while not found:
        inherited = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found = [line.decode() for line in inherited if line.startswith(b"CUDA_VISIBLE")]
    return found


def test_a_process_that_was_killed_leaves_a_sentence(tmp_path):
    pool = LocalPool(workers=1)
    worker = pool.start(Job(TrainConfig(**SMALL), tmp_path / "a"))
    pool.close()
    assert worker.problem() == "its process ended with -9, perhaps for memory; resume the sweep"


def test_a_stopped_sweep_does_not_count_runs_that_never_began(tmp_path):
    bad = SMALL | dict(model="no-such/model")
    configs = {f"bad-{seed}": TrainConfig(**bad, seed=seed) for seed in range(3)}
    with Run.create(tmp_path / "run", {}, bar=False) as run:
        (run.folder / "stop").touch()
        run_sweep(run, configs, workers=1)
    assert run.status == "interrupted"
    progress = read_progress(run.folder)
    assert (progress["i"], progress["n"]) == (1, 3)


DR2SEG = Path(sys.executable).parent / "dr2seg"
ASKED = dict(methods=["dpad", "dr2seg"], seeds=[0], config=SMALL | dict(eval_samples=4))


def words_of(experiment, folder, *more):
    given = [word for k, v in ASKED.items() for word in ("-p", k, json.dumps(v))]
    return [str(word) for word in (DR2SEG, "run", experiment, *given, "--out", folder, *more)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "run"
    done = subprocess.run(words_of("compare", folder), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_compare_sets_each_start_beside_the_trained(compared):
    results = read_json(compared / "results.json")
    assert {"table", "start", "differences", "arms"} <= results.keys()
    for name in "table", "start":
        assert "SNR | TSNR" in results[name]
        assert {"dpad", "dr2seg"} == {row.split()[1] for row in results[name].splitlines()[2:]}
    assert all(runs[0]["before"]["TSNR"] > 0 for runs in results["arms"].values())
    assert "dr2seg − its start" in results["differences"]
    assert (compared / "report.html").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["compare", "ablate"])
def test_a_sweep_is_done_when_its_tables_are(compared, experiment, tmp_path):
    "Killed behind its last training, it goes on, and trains nothing again."
    folder = tmp_path / "run"
    shutil.copytree(compared, folder)
    recorded = read_json(folder / "run.json") | dict(status="interrupted")
    if experiment == "ablate":
        recorded["parameters"]["vary"] = recorded["parameters"].pop("against") and {}
    (folder / "run.json").write_text(json.dumps(recorded))
    (folder / "results.json").unlink()
    trained = (folder / "dr2seg-s0" / "run.json").read_text()
    kill_at_its_tables(words_of(experiment, folder, "--resume"), tmp_path)
    assert run_status(folder) == "failed"
    mended = subprocess.run(
        words_of(experiment, folder, "--resume"), capture_output=True, text=True
    )
    assert mended.returncode == 0, mended.stderr
    assert run_status(folder) == "done"
    assert "differences" in read_json(folder / "results.json")
    assert (folder / "dr2seg-s0" / "run.json").read_text() == trained


# Reading the last run's answers, a process says so and waits.
WAITING = """
import os, pathlib, time

read_bytes = pathlib.Path.read_bytes

def waiting(path):
    if str(path).endswith("dr2seg-s0/predictions_after.jsonl"):
        pathlib.Path(os.environ["READS"]).touch()
        time.sleep(600)
    return read_bytes(path)

pathlib.Path.read_bytes = waiting
"""


def kill_at_its_tables(words, folder, seconds=300):
    "SIGKILL to the command and its kernel, once they read what was answered."
    (folder / "sitecustomize.py").write_text(WAITING)
    environment = os.environ | dict(PYTHONPATH=str(folder), READS=str(folder / "reads"))
    nothing, until = subprocess.DEVNULL, time.monotonic() + seconds
    with subprocess.Popen(words, stdout=nothing, stderr=nothing, env=environment) as command:
        while not (folder / "reads").exists():
            assert command.poll() is None, "it came to its end"
            assert time.monotonic() < until, "nobody has read the rows"
            time.sleep(0.1)
        family = psutil.Process(command.pid).children(recursive=True)
        for process in (*family, command):
            process.kill()
        psutil.wait_procs(family, timeout=30)  # their locks fall when they are gone
