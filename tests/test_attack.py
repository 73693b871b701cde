"A small attack of every kind, and that the attack would notice what it is there to notice."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_sixty_cases_end_in_a_result_or_a_sentence():
    "In a process of its own: one that forks must have no threads."
    done = subprocess.run(
        [sys.executable, TESTS / "attack.py", "--seed", "0", "--n", "60"],
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def judged(code):
    "What the attack makes of a case; in its own process, since it sets threads and environment."
    script = f"import json, attack\n{code}\nprint(json.dumps(attack.carry_out(does)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | dict(PYTHONPATH=f"{TESTS}:{os.environ.get('PYTHONPATH', '')}"),
    )
    return json.loads(done.stdout.splitlines()[-1])["outcome"]


@pytest.mark.parametrize(
    "error, outcome",
    [
        ("KeyError('x')", "flaw"),
        ("RecursionError()", "flaw"),
        ("MemoryError()", "flaw"),
        ("ValueError('x')", "flaw"),
        ("ValueError('a; ' * 1000)", "flaw"),
        ("ValueError('a.json is broken; mend it.')", "sentence"),
    ],
)
def test_only_a_sentence_is_a_sentence(error, outcome):
    assert judged(f"def does(): raise {error}") == outcome


def test_markup_on_a_page_is_noticed():
    raw = "def does(): attack_cases.page(f'<p>{hostile.MARK}</p>')"
    escaped = "def does(): attack_cases.page(html.escape(hostile.MARK))"
    imports = "import attack_cases, hostile, html\n"
    assert judged(imports + raw) == "flaw"
    assert judged(imports + escaped) == "result"
