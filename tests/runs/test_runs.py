"The run folder: what a reader finds in it however the writer ended."

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr2seg_lib.core.files import append_jsonl, read_json, read_jsonl, write_json
from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.runs.checkpoints import (
    find_resumable_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from dr2seg_lib.runs.listing import list_runs
from dr2seg_lib.runs.run_folder import Run, new_folder
from dr2seg_lib.runs.status import (
    STALE_SECONDS,
    lock_folder,
    read_progress,
    run_status,
    update_record,
)

ROWS = [{"step": i, "reward": i / 7, "text": "né\n"} for i in range(6)]


def start(code, *args):
    "Another process that writes a run; it prints a line when it is ready."
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


BUSY = """
import sys, time
from dr2seg_lib.runs.run_folder import Run
with Run.create(sys.argv[1], {"steps": 9}, bar=False) as run:
    run.log({"step": 1})
    with open(run.folder/"metrics.jsonl", "a") as f: f.write('{"step": 2, "rew')
    print("ready", flush=True)
    while not run.stop_requested(): time.sleep(0.01)
    if len(sys.argv) > 2:
        print("asked", flush=True)
        time.sleep(60)
"""


# ---- files


@given(st.integers(0, 400))
def test_a_file_cut_anywhere_reads_as_its_whole_lines(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    append_jsonl(path, ROWS)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    assert read_jsonl(path) == ROWS[: data.count(b"\n")]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2"):
        read_jsonl(tmp_path / "rows.jsonl")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json"):
        Run.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="rows.jsonl"):
        read_jsonl(tmp_path / "rows.jsonl")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is not valid JSON"):
        run_status(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", object())
    assert read_json(tmp_path / "a.json") == 1


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    with pytest.raises(
        OSError, match="metrics.jsonl cannot be written .No space left on device.; free space"
    ):
        with Run.create(tmp_path / "run", {}, bar=False) as run:
            (run.folder / "metrics.jsonl").symlink_to("/dev/full")
            run.log({"step": 1})
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run_status(tmp_path / "run") == "failed"
    assert "free space" in read_json(tmp_path / "run" / "run.json")["error"]

    def full(folder):
        raise RuntimeError("file write failed")

    with pytest.raises(
        OSError, match="checkpoint of step 3 cannot be written to .*file write failed"
    ):
        save_checkpoint(tmp_path / "run", 3, full)


def test_rows_are_strict_json(tmp_path):
    "A browser refuses NaN."
    with Run.create(tmp_path / "r", {"lr": float("inf")}, bar=False) as run:
        run.log({"step": 1, "kl": float("nan")})
    text = (tmp_path / "r/metrics.jsonl").read_text() + (tmp_path / "r/run.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert run.metrics() == [{"step": 1, "kl": None}]


# ---- how a run ends


def test_a_killed_writer_reads_failed_and_can_be_resumed(tmp_path):
    folder = tmp_path / "run"
    process = start(BUSY, folder)
    assert run_status(folder) == "running"
    with pytest.raises(ValueError, match=r"already holds a run \(running\)"):
        Run.create(folder, {})
    with pytest.raises(ValueError, match="another process"):
        Run.resume(folder)
    process.kill()
    process.wait()
    assert run_status(folder) == "failed"
    assert read_json(folder / "run.json")["status"] == "running"
    assert Run.open(folder).metrics() == [{"step": 1}]
    with Run.resume(folder, bar=False) as run:
        run.log({"step": 2})
    assert run.status == "done"
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    assert len(run.info["resumed"]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_run_after_its_step(tmp_path, number):
    process = start(BUSY, tmp_path / "run")
    process.send_signal(number)
    assert process.wait(60) == 0
    assert run_status(tmp_path / "run") == "interrupted"


def test_a_second_signal_interrupts_at_once(tmp_path):
    process = start(BUSY, tmp_path / "run", "deaf")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    assert read_json(tmp_path / "run/run.json")["status"] == "interrupted"


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with Run.create(tmp_path / "run", {}, bar=False):
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_stopping_an_outer_run_stops_the_inner_one(tmp_path):
    with Run.create(tmp_path / "ablate", {}, bar=False) as outer:
        with Run.create(outer.folder / "arm-1", {}, bar=False) as inner:
            os.kill(os.getpid(), signal.SIGINT)
            assert inner.stop_requested()
        with Run.create(outer.folder / "arm-2", {}, bar=False) as late:
            assert late.stop_requested()
        assert outer.stop_requested()
    assert [r["status"] for r in list_runs(tmp_path)] == ["interrupted"] * 3


def test_the_stop_file_is_seen_and_removed(tmp_path):
    with (
        Run.create(tmp_path / "ablate", {}, bar=False) as outer,
        Run.create(outer.folder / "arm", {}, bar=False) as inner,
    ):
        (outer.folder / "stop").touch()
        assert inner.stop_requested()
    assert outer.status == "done", "nobody asked the outer run, so it came to its end"
    assert not (outer.folder / "stop").exists()


def test_a_run_on_another_machine_is_judged_by_its_heartbeat(tmp_path):
    with Run.create(tmp_path / "run", {}, bar=False) as run:
        update_record(run.folder, host="elsewhere")
        assert run.status == "running"
        fall_silent(run.folder)
        assert run.status == "failed"
        run.progress("training", 1, 2)
        assert run.status == "running"


def fall_silent(folder):
    for path in folder.iterdir():
        os.utime(path, (0, time.time() - STALE_SECONDS - 1))


def test_a_run_that_is_alive_on_another_machine_is_not_gone_on_with_here(tmp_path, monkeypatch):
    "Not every shared disk passes locks on: here the lock is free, and only the heart beats."
    monkeypatch.setattr("dr2seg_lib.runs.status.HEARTBEAT_SECONDS", 0.2)
    run = Run.create(tmp_path / "run", {}, bar=False)
    update_record(run.folder, host="node-7")
    os.close(run.lock)
    with pytest.raises(ValueError, match="is being written on node-7; wait, or stop that run"):
        Run.resume(run.folder, bar=False)
    run.heart.close()
    time.sleep(0.3)
    fall_silent(run.folder)
    with Run.resume(run.folder, bar=False) as again:
        assert again.info["host"] != "node-7"
    assert again.status == "done"


def test_a_run_of_somebody_else_can_be_asked_for_its_status():
    "As root nothing is forbidden, so who asks gives its rights away first."
    script = """import encodings.utf_8_sig, os, sys
from filelock import lock_descriptor
from dr2seg_lib.runs.status import run_status
os.geteuid() or os.seteuid(65534)
print(run_status(sys.argv[1]))"""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        Path(name).chmod(0o755)
        with Run.create(folder, {}, bar=False):
            (folder / ".lock").chmod(0o444)
            folder.chmod(0o555)
            command = [sys.executable, "-c", script, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            folder.chmod(0o755)
    assert done.stdout == "running\n", done.stderr


# ---- what a folder takes


def test_a_folder_with_a_run_or_its_files_is_refused(tmp_path):
    with Run.create(tmp_path / "run", {"a": 1}, bar=False):
        pass
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run \(done\); choose another"):
        Run.create(tmp_path / "run", {})
    assert (tmp_path / "run/run.json").read_bytes() == before
    (tmp_path / "report.html").touch()
    with pytest.raises(ValueError, match="report.html"):
        Run.create(tmp_path, {})
    with pytest.raises(ValueError, match="is a file"):
        Run.create(tmp_path / "report.html", {})


def test_steps_are_logged_once(tmp_path):
    with Run.create(tmp_path / "run", {}, bar=False) as run:
        for step in 1, 2, 3:
            run.log({"step": step})
            run.record([{"step": step, "rollout": g} for g in range(2)])
        with pytest.raises(ValueError, match="step 3"):
            run.log({"step": 3})
        run.truncate_after(1)
        run.log({"step": 2})
        assert [r["step"] for r in run.metrics()] == [1, 2]
        assert len(run.rollouts()) == 2
        run.truncate_after(0)
        run.log({"step": 1})


def test_progress_tells_of_the_busy_runs(tmp_path):
    assert read_progress(tmp_path) is None
    with Run.create(tmp_path / "ablate", {}, bar=False) as outer:
        outer.progress("runs", 1, 9)
        for name in "dr2seg-0", "dr2seg-1", "dr2seg-2":
            with Run.create(outer.folder / name, {}, bar=False) as inner:
                inner.progress("training", 5, 60, "tokens 40")
                if name == "dr2seg-1":
                    shown = read_progress(outer.folder)
    assert (shown["stage"], shown["i"], shown["n"], shown["note"]) == (
        "runs",
        1,
        9,
        "dr2seg-1 training 5/60",
    )
    assert read_progress(outer.folder)["note"] == ""


# ---- checkpoints


def fill(text):
    def writer(folder):
        (folder / "deep").mkdir()
        (folder / "deep/adapter.safetensors").write_text(text)

    return writer


def test_checkpoints_keep_the_newest(tmp_path):
    for step in 5, 10, 15, 20:
        path = save_checkpoint(tmp_path, step, fill(str(step)), keep=3)
    assert path.name == "step-000020"
    assert latest_checkpoint(tmp_path) == path
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "step-000010",
        "step-000015",
        "step-000020",
    ]
    assert json.loads((path / "manifest.json").read_text())["step"] == 20
    save_checkpoint(tmp_path, 20, fill("again"))
    assert (path / "deep/adapter.safetensors").read_text() == "again"


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    kept = save_checkpoint(tmp_path, 5, fill("5"))

    def dies(folder):
        fill("10")(folder)
        raise OSError("disk full")

    with pytest.raises(OSError):
        save_checkpoint(tmp_path, 10, dies)
    assert latest_checkpoint(tmp_path) == kept
    assert save_checkpoint(tmp_path, 15, fill("15")) == latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "harm, words",
    [
        (
            lambda p: (p / "deep/adapter.safetensors").write_text("1O"),
            "adapter.safetensors differs",
        ),
        (lambda p: (p / "deep/adapter.safetensors").unlink(), "adapter.safetensors is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not valid JSON"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, harm, words):
    older, newer = (save_checkpoint(tmp_path, s, fill(str(s))) for s in (5, 10))
    harm(newer)
    with pytest.warns(UserWarning, match=words):
        assert latest_checkpoint(tmp_path) == older
    harm(older)
    with pytest.warns(UserWarning):
        assert latest_checkpoint(tmp_path) is None


def test_new_folders_do_not_collide(tmp_path):
    assert [new_folder(tmp_path / "runs", "demo").name for _ in range(3)] == [
        "demo-1",
        "demo-2",
        "demo-3",
    ]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p: p.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
        (Path.touch, "is a file; choose another"),
    ],
)
def test_a_new_folder_where_none_can_be_is_a_sentence(make, words, tmp_path):
    make(tmp_path / "runs")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        new_folder(tmp_path / "runs", "demo")


def test_a_new_folder_passes_over_links_files_and_folders(tmp_path):
    (tmp_path / "demo-1").symlink_to("nowhere")
    (tmp_path / "demo-2").touch()
    (tmp_path / "demo-3").mkdir()
    assert new_folder(tmp_path, "demo").name == "demo-4"


# ---- a second SIGTERM

STUCK = """
import hashlib, itertools, re, sys
from dr2seg_lib.runs.run_folder import Run
with Run.create(sys.argv[1], {"steps": 9}, bar=False) as run:
    run.log({"step": 1})
    print("ready", flush=True)
    CALL
"""
CALLS = dict(
    with_the_lock="all(itertools.repeat(True))",
    without_it="hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)",
    a_regular_expression="re.match(r'(a*)*b', 'a' * 60)",
    of_python="while True: pass",
)


@pytest.mark.parametrize("call", CALLS)
def test_a_second_sigterm_ends_whatever_the_process_is_at(call, tmp_path):
    process = start(STUCK.replace("CALL", CALLS[call]), tmp_path / "run")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None, "the first one only asks"
    assert run_status(tmp_path / "run") == "running", "the first one only asks"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert run_status(tmp_path / "run") == "failed"
    with Run.resume(tmp_path / "run", bar=False) as run:
        run.log({"step": 2})
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    assert run.status == "done"


CHILD = """
import sys, time
from dr2seg_lib.runs.signals import die_with_parent
from dr2seg_lib.runs.status import lock_folder
die_with_parent(int(sys.argv[1]))
lock = lock_folder(sys.argv[2])
print("ready", flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys, time
folder, child = sys.argv[1:]
subprocess.Popen([sys.executable, "-c", child, str(os.getpid()), folder])
time.sleep(60)
"""


def test_a_process_dies_with_the_one_that_started_it(tmp_path):
    parent = start(PARENT, tmp_path, CHILD)
    assert lock_folder(tmp_path) is None
    parent.kill()
    parent.wait()
    held = next(filter(None, (lock_folder(tmp_path) for _ in range(40))))
    os.close(held)


# ---- records that our code did not write


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not valid JSON"),
        ("null", "it is no JSON object"),
        ("[]", "it is no JSON object"),
        ("{}", 'field "status": Field required'),
        ("\xff\xfe", "not valid JSON"),
        ('{"status": "dead"}', 'field "status"'),
        ('{"status": "done", "parameters": [1]}', 'field "parameters"'),
        ('{"status": "done", "resumed": {}}', 'field "resumed"'),
        ('{"status": "done", "seed": "1"}', 'field "seed"'),
        ('{"status": "done", "started": 7}', 'field "started"'),
        ("[" * 100_000, "not valid JSON"),
    ],
    ids=range(11),
)
def test_a_bad_record_is_named_and_listed_beside_the_good(text, words, tmp_path):
    with Run.create(tmp_path / "good", {}, bar=False) as run:
        run.log({"step": 1})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_bytes(text.encode("latin-1"))
    for ask in run_status, Run.open, Run.resume, lambda f: update_record(f, seed=1):
        with pytest.raises(ValueError, match="bad/run.json") as told:
            ask(tmp_path / "bad")
        assert words in str(told.value)
        assert "\n" not in str(told.value)
    bad, good = list_runs(tmp_path)
    assert (good["status"], good["step"]) == ("done", 1)
    assert bad["status"] == "unreadable"
    assert "bad/run.json" in bad["error"]
    assert words in bad["error"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 3}\n'),
        ("metrics.jsonl", "[1]\n"),
        ("progress.json", "[]"),
        ("progress.json", ""),
        ("progress.json", '{"stage": 3}'),
    ],
)
def test_one_bad_file_of_a_run_hides_no_other_run(name, text, tmp_path):
    for folder in "a", "b":
        with Run.create(tmp_path / folder, {}, bar=False):
            pass
    (tmp_path / "a" / name).write_text(text)
    found = {r["folder"].name: r["status"] for r in list_runs(tmp_path)}
    assert found == dict(a="unreadable" if name == "metrics.jsonl" else "done", b="done")
    assert read_progress(tmp_path / "a") is None


def test_a_run_deleted_while_at_work_is_one_sentence(tmp_path):
    with pytest.raises(
        OSError,
        match="metrics.jsonl cannot be written .No such file or directory.; "
        ".*run was deleted or moved; restore it and resume, or start anew",
    ):
        with Run.create(tmp_path / "run", {}, bar=False) as run:
            shutil.rmtree(run.folder)
            run.log({"step": 1})
    with pytest.raises(
        FileNotFoundError, match="run.json was deleted or moved while the run was at work"
    ):
        with Run.create(tmp_path / "run", {}, bar=False) as run:
            shutil.rmtree(run.folder)
    with (
        pytest.raises(OSError, match="checkpoint of step 1 cannot be written"),
        Run.create(tmp_path / "run", {}, bar=False) as run,
    ):
        shutil.rmtree(run.folder)
        save_checkpoint(run.folder, 1, fill("1"))
    assert not (tmp_path / "run").exists(), "nothing is made anew in its place"


def test_another_run_in_the_place_of_a_deleted_one_is_left_alone(tmp_path):
    with pytest.raises(ValueError, match="metrics.jsonl was changed while the run was writing it"):
        with Run.create(tmp_path / "run", {}, bar=False) as run:
            run.log({"step": 1})
            shutil.rmtree(run.folder)
            with Run.create(tmp_path / "run", {"other": 1}, bar=False):
                pass
            run.log({"step": 2})
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_fresh_run_does_not_go_on_from_checkpoints_that_lie_about(tmp_path):
    save_checkpoint(tmp_path, 5, fill("5"))
    with pytest.raises(ValueError, match="already holds checkpoints; choose another folder"):
        Run.create(tmp_path, {})


# ---- what a resume changes


def test_a_resume_records_what_it_changes_and_refuses_the_rest(tmp_path):
    with Run.create(tmp_path / "run", TrainConfig().model_dump(), bar=False) as run:
        run.stopped = True
    with pytest.raises(ValueError, match="run: the run was started with lora.rank = 32, not 8"):
        Run.resume(tmp_path / "run", False, TrainConfig(rank=8))
    assert run.status == "interrupted"
    assert run.info["resumed"] == []
    with Run.resume(tmp_path / "run", False, TrainConfig(lr=1e-4, checkpoint_every=5)) as run:
        run.stopped = True
    with Run.resume(tmp_path / "run", False, TrainConfig(lr=1e-4, checkpoint_every=5)) as run:
        pass
    assert [r["changed"] for r in run.info["resumed"]] == [
        {"optim.lr": [1e-3, 1e-4], "runtime.checkpoint_every": [20, 5]},
        {},
    ]
    assert run.info["parameters"] == json.loads(
        json.dumps(TrainConfig(lr=1e-4, checkpoint_every=5).model_dump())
    )


# ---- checkpoints that our code did not write


@pytest.mark.parametrize(
    "text, words",
    [
        ("[]", "no valid object"),
        ("null", "no valid object"),
        ("{}", "no valid step"),
        ('{"step": 10, "files": {}}', "no valid files"),
        ('{"step": "10", "files": {"a": "b"}}', "no valid step"),
        ('{"step": 10, "files": ["a"]}', "no valid files"),
        ('{"step": 10, "files": {"a": 1}}', "no valid files.a"),
        ('{"step": 10, "files": {"../a": "0"}}', "names ../a, which is outside"),
        ('{"step": 10, "files": {"/etc/passwd": "0"}}', "outside"),
        ('{"step": 11, "files": {"a": "0"}}', "is of step 11"),
        ("\xff", "not valid JSON"),
        ('{"step": 10, "files": {"a": "0"}, "rows": {}}', "no valid rows"),
        ('{"step": 10, "files": {"a": "0"}, "rows": {"x": 1}}', "no valid rows"),
    ],
    ids=range(13),
)
def test_a_manifest_that_is_none_is_named(text, words, tmp_path):
    older, newer = (save_checkpoint(tmp_path, s, fill(str(s))) for s in (5, 10))
    (newer / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.warns(UserWarning, match="step-000010 is damaged"):
        assert latest_checkpoint(tmp_path) == older
    assert words in verify_checkpoint(newer)
    with pytest.warns(UserWarning, match="step-000010 cannot be gone on from"):
        assert find_resumable_checkpoint(tmp_path) == older


def test_what_only_looks_like_a_checkpoint_is_left_alone(tmp_path):
    kept = save_checkpoint(tmp_path, 1, fill("1"))
    strange = [
        tmp_path / "checkpoints" / name
        for name in ("step-abc", "step-", "step-1e3", "step--2", "step-000002.bak")
    ]
    for path in strange:
        path.mkdir()
    (tmp_path / "checkpoints" / "step-000009").write_text("a file")
    assert latest_checkpoint(tmp_path) == find_resumable_checkpoint(tmp_path) == kept
    for step in 2, 3, 4:
        last = save_checkpoint(tmp_path, step, fill("x"))
    assert list_checkpoints(tmp_path) == [last, last.with_name("step-000003")]
    assert all(p.is_dir() for p in strange)
    with pytest.raises(OSError, match="checkpoint of step 9 cannot be written.*step-000009"):
        save_checkpoint(tmp_path, 9, fill("9"))


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in 999_999, 1_000_000:
        save_checkpoint(tmp_path, step, fill(str(step)))
    assert latest_checkpoint(tmp_path).name == "step-1000000"


def test_a_step_that_is_made_again_leaves_no_later_one(tmp_path):
    for step in 10, 20:
        save_checkpoint(tmp_path, step, fill(str(step)))
    save_checkpoint(tmp_path, 15, fill("15"))
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000015", "step-000010"]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    with Run.create(tmp_path / "run", {}, bar=False) as run:
        run.log({"step": 1})
        path = save_checkpoint(run.folder, 1, fill("1"), rows=run.marks())
    (path / "deep/adapter.safetensors").unlink()
    with (
        Run.resume(run.folder, bar=False) as run,
        pytest.warns(UserWarning),
        pytest.raises(
            ValueError, match="step-000001: deep/adapter.safetensors is missing.; restore the files"
        ),
    ):
        run.rewind()
    assert run.metrics() == [{"step": 1}]


def test_checkpoints_have_the_permissions_of_the_umask(tmp_path):
    def private(folder):
        os.close(os.open(folder / "adapter", os.O_CREAT | os.O_WRONLY, 0o600))

    before = os.umask(0o027)
    try:
        path = save_checkpoint(tmp_path, 1, private)
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in path.iterdir()} == {"0o640"}
    assert sorted(p.name for p in path.iterdir()) == ["adapter", "manifest.json"]


# ---- a disk that is full


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 256 kB."
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    )
    if done.returncode:
        pytest.skip("only root may mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_on_a_full_disk_no_line_is_half_and_the_run_goes_on_later(small_disk):
    def row(step):
        return {"step": step, "text": "x" * 3000}

    with pytest.raises(
        OSError,
        match="metrics.jsonl cannot be written .No space left on device.; "
        "free space or grant permission, then resume",
    ):
        with Run.create(small_disk / "run", {}, bar=False) as run:
            for step in itertools.count(1):
                run.log(row(step))
    assert run.status == "failed"
    assert (run.folder / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert len(run.metrics()) == step - 1
    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    with Run.resume(run.folder, bar=False) as run:
        run.log(row(step))
    assert run.status == "done"
    assert [r["step"] for r in run.metrics()] == list(range(1, step + 1))


def test_on_a_full_disk_the_last_checkpoint_stays_whole(small_disk):
    kept = save_checkpoint(small_disk, 1, fill("x" * 60_000))
    with pytest.raises(
        OSError,
        match="the checkpoint of step 2 cannot be written to .*disk/checkpoints "
        ".*No space left.*free space",
    ):
        save_checkpoint(small_disk, 2, fill("x" * 600_000))
    assert find_resumable_checkpoint(small_disk) == kept
