"Annotations as strangers leave them, in folders that cannot be written, and by writers that die."

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import hostile_runs as hostile
import pytest

from dr2seg_lib.runs.annotations import annotate, open_annotations, read_annotations

WHERE = "rollouts", 3, "mini-7"


def refusal(folder, *where, **said):
    with pytest.raises((ValueError, OSError)) as caught:
        annotate(folder, *where, **said)
    (sentence,) = str(caught.value).splitlines()
    return sentence


def test_a_file_written_by_hand_is_read(tmp_path):
    "No newline at the end, blank lines, other fields, and the last row of a key."
    (tmp_path / "annotations.jsonl").write_text(
        '\ufeff{"source":"evaluation","sample":"x","rollout":1,"verdict":"wrong","by":"me"}\n\n'
        '{"source":"evaluation","step":9,"sample":"x","rollout":1,"tags":["a"]}'
    )
    rows, problem = open_annotations(tmp_path)
    assert problem == ""
    assert list(rows) == [("evaluation", None, "x", 1)]
    assert (rows["evaluation", None, "x", 1]["tags"]) == ["a"]
    assert rows["evaluation", None, "x", 1]["verdict"] is None


@pytest.mark.parametrize("seed", range(40))
def test_whatever_a_line_holds_the_others_are_read(seed, tmp_path):
    rng, values = random.Random(seed), [*hostile.WORDS, *hostile.NUMBERS]
    row = dict(source="rollouts", step=1, sample="s", rollout=0, tags=[], note="", verdict=None)
    lines = []
    for _ in range(20):
        field = rng.choice(list(row))
        value = rng.choice(values)
        lines.append(json.dumps(row | {field: [value] if rng.random() < 0.3 else value}))
    lines.insert(rng.randrange(20), rng.choice(["\x00", "{", "[]", "3", "\ud83d", "[" * 10**5]))
    good = json.dumps(row | dict(sample="good", verdict="right"))
    text = "\n".join([*lines, good, good[: rng.randrange(len(good))]])
    (tmp_path / "annotations.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
    rows, problem = open_annotations(tmp_path)
    assert rows["rollouts", 1, "good", 0]["verdict"] == "right"
    assert problem.startswith("annotations.jsonl, line ")
    assert len(problem.splitlines()) == 1
    assert len(problem) < 300
    json.dumps([[*key, said] for key, said in rows.items()], allow_nan=False)
    annotate(tmp_path, *WHERE, 0, verdict="wrong")
    assert read_annotations(tmp_path).keys() == {*rows, (*WHERE, 0)}


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_what_is_no_plain_file_is_neither_written_nor_waited_for(kind, tmp_path):
    path, target = tmp_path / "annotations.jsonl", tmp_path / "bashrc"
    target.write_text("mine\n")
    dict(folder=path.mkdir, pipe=lambda: os.mkfifo(path), link=lambda: path.symlink_to(target))[
        kind
    ]()
    assert read_annotations(tmp_path) == {}
    assert "is no plain file; remove it" in refusal(tmp_path, *WHERE, 0, verdict="right")
    assert target.read_text() == "mine\n"


@pytest.fixture
def nobody():
    "Another user, where the tests are run as root: for root nothing is read-only."
    root = os.getuid() == 0
    if root:
        os.seteuid(65534)
    yield
    if root:
        os.seteuid(0)


@pytest.fixture
def read_only():
    "A run's folder that may be read alone; not below pytest's, which is closed to others."
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "run"
        folder.mkdir()
        annotate(folder, *WHERE, 0, verdict="right")
        os.chmod(above, 0o755)
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)


def test_a_folder_that_may_not_be_written_is_said(read_only, nobody):
    assert len(read_annotations(read_only)) == 1
    assert refusal(read_only, *WHERE, 0, verdict="wrong") == (
        f"{read_only / 'annotations.jsonl'} cannot be written (Permission denied); "
        "grant permission, free space, or annotate a copy of the run"
    )
    assert read_annotations(read_only)[(*WHERE, 0)]["verdict"] == "right"


def test_a_writer_that_is_killed_takes_no_row_of_others_with_it(tmp_path):
    code = (
        "import sys; from dr2seg_lib.runs.annotations import annotate\n"
        "for i in range(10**6): annotate(sys.argv[1], 'rollouts', i, 's', 1, note='x' * 999)"
    )
    killed = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    while not (tmp_path / "annotations.jsonl").exists():
        assert killed.poll() is None
    for i in range(20):
        annotate(tmp_path, "rollouts", i, "s", 0, verdict="right")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with open(tmp_path / "annotations.jsonl", "a") as f:
        f.write('{"source": "rollo')  # as a power cut leaves it
    annotate(tmp_path, "rollouts", 20, "s", 0, verdict="wrong")
    rows, problem = open_annotations(tmp_path)
    mine = {key: said["verdict"] for key, said in rows.items() if key[3] == 0}
    assert mine == {("rollouts", i, "s", 0): "wrong" if i == 20 else "right" for i in range(21)}
    assert "is not valid JSON" in problem
