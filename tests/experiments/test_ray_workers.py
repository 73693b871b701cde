"A sweep on a Ray cluster of three nodes on this machine; one of them dies, and nothing is lost."

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.core.settings import ClusterSettings
from dr2seg_lib.experiments.local_workers import find_answered
from dr2seg_lib.experiments.ray_workers import STORE_BYTES, TRIES, start_ray
from dr2seg_lib.experiments.sweeps import interleave_seeds, run_sweep, sweep_arms
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.status import run_status
from dr2seg_lib.training.trainer import train

ray = pytest.importorskip("ray", reason='Ray is missing; pip install "dr2seg_lib[cluster]"')
TIMES = "seconds", "tokens_per_second"
TINY = dict(
    steps=3,
    segmenter="grabcut",
    lora=dict(rank=4, alpha=4),
    rollout=dict(questions_per_step=1, group_size=2, max_new_tokens=24),
    evaluation=dict(samples=2, every=0),
    runtime=dict(checkpoint_every=1, recorded_groups=1),
)
RUNS = interleave_seeds(sweep_arms(["visionreasoner", "dr2seg"], [0, 1, 2], **TINY))


@pytest.mark.parametrize("address", ["127.0.0.1:9", "localhost:99999"])
def test_a_cluster_that_is_not_there_is_one_sentence(address, tmp_path):
    with Run.create(tmp_path / "sweep", {}, bar=False) as run:
        with pytest.raises(
            ValueError, match=f"no Ray cluster answers at {address}.*ray start --head"
        ):
            run_sweep(run, RUNS, cluster=ClusterSettings(address=address))


def test_ray_that_does_not_start_is_tried_again(monkeypatch):
    "Ray gives its agents 15 s; where the machine is busy the second try finds them in memory."
    import ray

    tries, answers = [], [Exception("The current node timed out during startup. Perhaps"), "here"]

    def init(**options):
        tries.append(options["address"])
        if isinstance(answer := answers[min(len(tries), len(answers)) - 1], Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray, "init", init)
    assert start_ray() == "here"
    assert tries == ["local"] * 2
    answers[1:] = []
    with pytest.raises(ValueError, match="does not start on this machine .*timed out"):
        start_ray()
    assert len(tries) == 2 + TRIES


def marked(mark: str) -> list[str]:
    "What the processes are called that have inherited a mark in their environment."
    names = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it ended meanwhile
            if mark.encode() in path.read_bytes():
                names.append(path.with_name("comm").read_text().strip())
    return names


@pytest.fixture(scope="module")
def cluster():
    "Three nodes of one CPU each."
    from ray.cluster_utils import Cluster

    mark = f"DR2SEG_CLUSTER={uuid4()}"  # a test beside this one may have a cluster too
    os.environ |= dict([mark.split("=")])
    os.environ["RAY_worker_niceness"] = "0"  # else the runs would wait for everything else here
    small = dict(num_cpus=1, object_store_memory=STORE_BYTES, include_log_monitor=False)
    nodes = Cluster(initialize_head=True, head_node_args=small | dict(include_dashboard=False))
    workers = [nodes.add_node(**small) for _ in range(2)]
    assert len(marked(mark)) >= 3  # the raylets at least
    yield nodes, workers
    nodes.shutdown()
    for _ in range(100):
        if not marked(mark):
            break
        time.sleep(0.2)
    assert not marked(mark)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    "The same six runs without Ray, one after the other."
    folder, threads = tmp_path_factory.mktemp("undisturbed"), torch.get_num_threads()
    torch.set_num_threads(1)  # as each has on the cluster
    for name, config in RUNS.items():
        train(config, folder / name)
    torch.set_num_threads(threads)
    return folder


def process_under_way(folder: Path, nodes) -> tuple:  # node, its process
    "A node that is training, not the head, and the process of its run, once it has a checkpoint."
    for _ in range(3000):
        for path in folder.glob("*/checkpoints/step-000001"):
            record = read_json(path.parents[1] / "run.json")
            parent = Path(f"/proc/{record['pid']}/stat")
            if record["status"] != "running" or not parent.exists():
                continue
            raylet = int(parent.read_text().rpartition(")")[2].split()[1])
            for node in nodes:
                if raylet == node.all_processes["raylet"][0].process.pid:
                    return node, path.parents[1], record["pid"]
        time.sleep(0.05)
    raise AssertionError("no run was seen under way on a node that may be taken away")


@pytest.mark.slow
def test_a_sweep_outlives_a_node_and_gives_the_numbers_of_one_machine(
    cluster, undisturbed, tmp_path
):
    nodes, workers = cluster
    settings, failed = ClusterSettings(address=nodes.address), {}
    with Run.create(tmp_path / "sweep", {}, bar=False) as run, ThreadPoolExecutor(1) as pool:
        working = pool.submit(run_sweep, run, RUNS, cluster=settings)
        node, folder, pid = process_under_way(run.folder, workers)
        os.kill(pid, signal.SIGSTOP)  # it cannot be done before its node is gone
        nodes.remove_node(node, allow_graceful=False)
        failed = working.result(timeout=500)
    assert failed == {}
    assert {run_status(run.folder / name) for name in RUNS} == {"done"}
    assert len(read_json(folder / "run.json")["resumed"]) == 1
    assert read_json(folder / "run.json")["pid"] != pid
    for name in RUNS:
        for file in "metrics.jsonl", "rollouts.jsonl", "predictions_after.jsonl":
            here, there = (read_jsonl(f / name / file) for f in (run.folder, undisturbed))
            assert [timeless(r) for r in here] == [timeless(r) for r in there], (name, file)
    assert not ray.is_initialized()


def timeless(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in TIMES}


@pytest.mark.slow
def test_stop_reaches_the_runs_and_those_that_wait_never_begin(cluster, tmp_path):
    nodes, _ = cluster
    settings = ClusterSettings(address=nodes.address)
    long = {name: TrainConfig(**TINY | dict(steps=500, seed=name)) for name in range(3)}
    configs = {f"run-{seed}": config for seed, config in long.items()}
    broken = dict(broken=TrainConfig(**TINY | dict(model="no-such/model")))
    with Run.create(tmp_path / "sweep", {}, bar=False) as run, ThreadPoolExecutor(1) as pool:
        working = pool.submit(run_sweep, run, broken | configs, cluster=settings)
        while not list(run.folder.glob("run-*/metrics.jsonl")) and not working.done():
            time.sleep(0.1)
        (run.folder / "stop").touch()
        failed = working.result(timeout=300)
    assert list(failed) == ["broken"]
    assert failed["broken"].startswith("ValueError: model no-such/model cannot be loaded")
    assert run.status == "interrupted"
    begun = [name for name in configs if (run.folder / name / "run.json").exists()]
    assert {run_status(run.folder / name) for name in begun} == {"interrupted"}
    assert len(begun) < len(configs)
    assert find_answered(tuple(run.folder / name for name in begun))
