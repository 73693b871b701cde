"Runs of ten thousand rollouts: opened within two seconds, in little memory, and shown as they are."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from invented_runs import make_run

from dr2seg_lib.core.files import read_jsonl, write_jsonl
from dr2seg_lib.viewing.inspector import inspect

ROOT = Path(__file__).parents[2]
ROLLOUTS, EACH = 10_000, 8  # of a question
MEASURE = """
import json, sys, time
from dr2seg_lib.viewing.inspector import inspect

def memory(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1]) / 1024

def plainly(path):
    began = time.process_time()
    for line in open(path, "rb"):
        json.loads(line)
    return time.process_time() - began

def opened(folder):
    began = time.process_time()
    view = inspect(folder)
    return time.process_time() - began, view

folder = sys.argv[1]
plain = plainly(folder + "/rollouts.jsonl")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = memory("VmRSS")
seconds, view = opened(folder)
facts = dict(memory=memory("VmHWM") - before, rows=len(view.index["rollouts"]["group"]))
facts |= dict(sent=len(json.dumps(view.get_state()["index"])))
facts |= dict(seconds=min(seconds, opened(folder)[0]))
print(json.dumps(facts | dict(plain=min(plain, plainly(folder + "/rollouts.jsonl")))))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "10,000 rollouts, each about as long as the embedded policy's."
    folder = make_run(tmp_path_factory.mktemp("large") / "run", steps=12, samples=16)
    rows = read_jsonl(folder / "rollouts.jsonl")
    groups = [rows[i : i + EACH] for i in range(0, len(rows), EACH)]
    write_jsonl(
        folder / "rollouts.jsonl",
        [
            row | dict(step=1 + g // 2, sample=f"mini-{1_000_000 + g}")
            for g in range(ROLLOUTS // EACH)
            for row in groups[g % len(groups)]
        ],
    )
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
def test_ten_thousand_rollouts_open_fast_and_small(large):
    """In a process of its own; the bound on time is a ratio to Python's own parser, as machines
    differ. Reading every record at once took 5 of it and 210 MB."""
    size = (large / "rollouts.jsonl").stat().st_size
    assert 3000 < size / ROLLOUTS < 5000, "as long as real ones"
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", MEASURE, str(large)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["rows"] == ROLLOUTS
    assert facts["memory"] < 120, facts
    assert facts["seconds"] < 3.2 * facts["plain"], facts
    assert facts["sent"] < 1_500_000, facts


def test_a_group_is_read_when_it_is_shown(large):
    "The words are those of the file; a file that has changed since is told of, and nothing breaks."
    view, rows = inspect(large), read_jsonl(large / "rollouts.jsonl")
    for at in (0, 617, ROLLOUTS // EACH - 1):
        group = view.run.groups["rollouts"][at]
        assert group == rows[EACH * at : EACH * (at + 1)]
        view.at = at
        assert view.shown["query"] == group[0]["query"]


def test_a_run_that_is_cut_while_it_is_looked_at(tmp_path):
    "A resumed training may cut the file and write other rows: a sentence, no traceback."
    folder = make_run(tmp_path / "run", steps=12, samples=4)
    view, rows = inspect(folder), read_jsonl(folder / "rollouts.jsonl")
    write_jsonl(folder / "rollouts.jsonl", rows[:EACH])
    view.at = 3
    said = "rollouts.jsonl has changed since it was opened; open the run again"
    assert view.shown == dict(note=said)
    assert view.answer("rollouts", 3, 0)["note"] == f"no mask: {said}"
    assert view.still()._repr_mimebundle_()[0]["image/png"]
    view.measure()
    assert view.index["rollouts"]["iou"][-EACH:] == [None] * EACH
    view.at = 0
    assert view.shown["query"] == rows[0]["query"]
    assert inspect(folder).shown["entries"]


def test_a_run_that_grows_while_it_is_looked_at(tmp_path):
    folder = make_run(tmp_path / "run", steps=12, samples=4)
    view, rows = inspect(folder), read_jsonl(folder / "rollouts.jsonl")
    with (folder / "rollouts.jsonl").open("a") as f:
        f.write(json.dumps(rows[0] | dict(step=99)) + "\n")
    view.at = 5
    assert len(view.shown["entries"]) == EACH
    assert len(inspect(folder).run.groups["rollouts"]) == len(view.run.groups["rollouts"]) + 1
