"""A few of the kills of kills.py and cuts of powercut.py.

Each in a process of its own: forking one that has computed would hang.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TOOLS = Path(__file__).parents[1]


def run(tool: str, *arguments: str) -> dict:  # what it counts
    command = [sys.executable, TOOLS / tool, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_resume_bit_exactly():
    counts = run("kills.py", "--kills", "4")
    assert counts["kills"] == 4
    assert counts["runs"] >= 1


def test_a_killed_sweep_goes_on_bit_exactly():
    assert run("kills.py", "--sweep", "2")["killed"] == dict(parent=1, worker=1)


def test_nothing_is_lost_when_the_power_is_cut():
    counts = run("powercut.py", "--resumed", "3")
    assert counts["states"] > 30
    assert counts["resumed"] >= 3


def test_a_forgotten_sync_is_found():
    "The test itself: without the folder's sync after a rename, a power cut takes the checkpoint."
    command = [sys.executable, TOOLS / "powercut.py", "--resumed", "0", "--forget-folders"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "lost" in done.stderr
