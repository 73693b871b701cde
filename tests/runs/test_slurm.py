"The scripts for SLURM: under bash with SLURM's variables, and in SLURM itself where it runs."

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.training.trainer import train

SCRIPTS = Path(__file__).parents[2] / "scripts" / "slurm"
STEPS = 16
VALUES = {
    "steps": STEPS,
    "segmenter": "grabcut",
    "lora.rank": 4,
    "rollout.questions_per_step": 2,
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 16,
    "evaluation.samples": 0,
    "runtime.checkpoint_every": 4,
}
TRAIN = ["train", *(word for pair in VALUES.items() for word in ("-p", *map(str, pair)))]
COMMANDS = dict(  # of SLURM, as far as the scripts need them
    scontrol='case "$1" in requeue) echo "$2" > "$CALLS/requeued";; show) echo node0; esac',
    srun="""while [ "${1#--}" != "$1" ]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
for pid in $pids; do wait "$pid" || code=$?; done
exit "${code:-0}" """,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The training without SLURM, undisturbed."
    return train(TrainConfig(**VALUES), tmp_path_factory.mktemp("whole") / "run")


class Job:
    "A script in the hands of something that acts as SLURM."

    def __init__(self, folder, script="one_node", words=TRAIN, nodes=1, more=None):
        self.folder, self.command = folder, ["bash", SCRIPTS / f"{script}.sbatch", *words]
        for name, text in (COMMANDS | (more or {})).items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("#!/bin/bash\n" + text + "\n")
            path.chmod(0o755)
        slurm = dict(SLURM_JOB_ID="17", SLURM_NNODES=str(nodes), SLURM_JOB_NODELIST="node0")
        paths = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        mine = dict(OUT=str(folder / "run"), CALLS=str(folder), PATH=paths)
        self.environment = os.environ | slurm | mine

    def start(self) -> subprocess.Popen:
        log = open(self.folder / "log", "a")
        return subprocess.Popen(
            self.command, env=self.environment, stdout=log, stderr=log, start_new_session=True
        )

    def rows(self) -> int:
        path = self.folder / "run" / "metrics.jsonl"
        return len(read_jsonl(path)) if path.exists() else 0

    def wait_for_rows(self, count):
        wait_until(lambda: self.rows() >= count)

    def log(self):
        return (self.folder / "log").read_text()


def wait_until(reached, seconds=300):
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def timeless(run):
    kept = [dict(row) for row in run.metrics()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in kept]


def assert_same(folder, whole):
    run = Run.open(folder)
    assert run.status == "done"
    assert timeless(run) == timeless(whole)
    first, second = (read_jsonl(r.folder / "rollouts.jsonl") for r in (run, whole))
    assert first == second
    file = "adapter_model.safetensors"
    weights, others = (load_file(latest_checkpoint(r.folder) / file) for r in (run, whole))
    assert weights.keys() == others.keys()
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_a_job_that_is_ended_and_queued_again_ends_as_if_it_had_not_been(tmp_path, whole):
    job = Job(tmp_path)
    process = job.start()
    job.wait_for_rows(2)
    process.send_signal(signal.SIGUSR1)  # the time limit comes near: it asks to be queued again
    assert process.wait() == 0, job.log()
    assert "which holds no run yet: it starts" in job.log()
    assert Run.open(tmp_path / "run").status == "interrupted"
    assert (tmp_path / "requeued").read_text() == "17\n"
    assert 2 <= job.rows() < STEPS, "in the middle"
    assert job.start().wait() == 0, job.log()
    assert len(Run.open(tmp_path / "run").info["resumed"]) == 1
    assert_same(tmp_path / "run", whole)


WAITS = """echo "node $SLURM_NODEID: $*" >> "$CALLS/asked"
mkdir -p "$OUT"; touch "$OUT/begun"
until [ -e "$OUT/stop" ]; do sleep 0.05; done
exit 130"""  # in place of dr2seg: it ends when the script asks for it


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_only_the_time_limit_queues_a_job_again(tmp_path, number):
    job = Job(tmp_path, more=dict(dr2seg=WAITS))
    process = job.start()
    wait_until((tmp_path / "run" / "begun").exists)
    process.send_signal(number)
    assert process.wait() == (130 if number == signal.SIGTERM else 0), job.log()
    assert (tmp_path / "requeued").exists() == (number == signal.SIGUSR1)


def test_the_first_of_two_nodes_runs_and_the_other_joins(tmp_path):
    "What they then do together is in test_nodes."
    job = Job(tmp_path, "two_nodes", ["train", "-p", "seed", "1"], 2, dict(dr2seg=WAITS))
    process = job.start()
    asked = tmp_path / "asked"
    wait_until(lambda: asked.exists() and len(asked.read_text().splitlines()) == 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130, job.log()
    out = tmp_path / "run"
    run = f"node 0: run train -p seed 1 -p runtime.nodes 2 --out {out} --resume"
    assert sorted(asked.read_text().splitlines()) == [run, f"node 1: join {out}"]


def test_a_job_says_what_it_lacks(tmp_path):
    job = Job(tmp_path)
    del job.environment["OUT"]
    assert job.start().wait() != 0
    assert "OUT: is the folder of the run: sbatch --export=ALL,OUT=runs/NAME" in job.log()


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda p: p.stem)
def test_the_scripts_ask_slurm_alike(script):
    text = script.read_text()
    subprocess.run(["bash", "-n", script], check=True)
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --signal=B:USR1@900" in asked
    assert "#SBATCH --requeue" in asked
    ending = text[text.index("# A file `stop`") :]
    assert ending == (SCRIPTS / "one_node.sbatch").read_text()[-len(ending) :]


def slurm_runs() -> bool:
    "Whether a SLURM is here that takes jobs."
    if not shutil.which("sbatch"):
        return False
    command = ["timeout", "10", "sinfo", "-h", "-o", "%t"]  # it may wait long for a dead SLURM
    nodes = subprocess.run(command, capture_output=True, text=True)
    return nodes.returncode == 0 and nodes.stdout.strip() in ("idle", "mix", "alloc")


@pytest.mark.slow
@pytest.mark.skipif("not slurm_runs()", reason="no SLURM runs here")
def test_slurm_itself_queues_a_job_again(tmp_path, whole):
    job = Job(tmp_path)
    options = "--gpus-per-node=0 --cpus-per-task=1 --time=0:30:00 --parsable --export=ALL"
    output = f"--output={tmp_path / 'log'}"
    words = ["sbatch", *shlex.split(options), output, *job.command[1:]]
    paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | dict(OUT=str(tmp_path / "run"), PATH=paths)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    number = done.stdout.strip()
    job.wait_for_rows(5)
    subprocess.run(["scontrol", "requeue", number], check=True)
    state = ["squeue", "-h", "-j", number, "-o", "%T"]
    wait_until(lambda: "PENDING" in subprocess.run(state, capture_output=True, text=True).stdout)
    assert Run.open(tmp_path / "run").status == "interrupted"
    rows = job.rows()
    # it would wait two minutes otherwise
    subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], check=True)
    wait_until(lambda: Run.open(tmp_path / "run").status == "done")
    assert 5 <= rows < STEPS
    assert len(Run.open(tmp_path / "run").info["resumed"]) == 1
    assert_same(tmp_path / "run", whole)
