"A few of the kills of kills.py, in a process of its own: forking one that has computed already would hang."
import json
import subprocess
import sys
from pathlib import Path


def test_killed_runs_resume_bit_exactly():
    done = subprocess.run([sys.executable, Path(__file__).with_name("kills.py"), "--kills", "4"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] == 4 and counts["in_checkpoint"] == 2 and counts["runs"] >= 1
