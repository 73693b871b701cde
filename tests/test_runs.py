"The run folder: what a reader finds in it however the writer ended."
import json, os, signal, subprocess, sys, time
import pytest
from hypothesis import given, strategies as st
from dr2seg_lib import runs
from dr2seg_lib.runs import Run

ROWS = [{"step": i, "reward": i / 7, "text": "né\n"} for i in range(6)]


def start(code, *args):
    "Another process that writes a run; it prints a line when it is ready."
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


BUSY = """
import sys, time
from dr2seg_lib.runs import Run
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
    path = tmp_path_factory.mktemp("cut")/"rows.jsonl"
    runs.append_jsonl(path, ROWS)
    data = path.read_bytes()[:cut]
    path.write_bytes(data)
    assert runs.read_jsonl(path) == ROWS[:data.count(b"\n")]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path/"rows.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 2"): runs.read_jsonl(tmp_path/"rows.jsonl")


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run.json"): Run.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="rows.jsonl"): runs.read_jsonl(tmp_path/"rows.jsonl")
    (tmp_path/"run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is not valid JSON"): runs.status(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    runs.write_json(tmp_path/"a.json", 1)
    with pytest.raises(TypeError): runs.write_json(tmp_path/"a.json", object())
    assert runs.read_json(tmp_path/"a.json") == 1


def test_a_full_disk_is_told_in_a_sentence(tmp_path):
    with pytest.raises(OSError, match="metrics.jsonl cannot be written .No space left on device.; free space"):
        with Run.create(tmp_path/"run", {}, bar=False) as run:
            (run.folder/"metrics.jsonl").symlink_to("/dev/full")
            run.log({"step": 1})
    (tmp_path/"run"/"metrics.jsonl").unlink()
    assert runs.status(tmp_path/"run") == "failed" and "free space" in runs.read_json(tmp_path/"run"/"run.json")["error"]
    def full(folder): raise RuntimeError("file write failed")
    with pytest.raises(OSError, match="checkpoint of step 3 cannot be written to .*file write failed"): runs.save_checkpoint(tmp_path/"run", 3, full)


def test_rows_are_strict_json(tmp_path):
    "A browser refuses NaN."
    with Run.create(tmp_path/"r", {"lr": float("inf")}, bar=False) as run: run.log({"step": 1, "kl": float("nan")})
    text = (tmp_path/"r/metrics.jsonl").read_text() + (tmp_path/"r/run.json").read_text()
    assert "NaN" not in text and "Infinity" not in text and run.metrics() == [{"step": 1, "kl": None}]


# ---- how a run ends

def test_a_killed_writer_reads_failed_and_can_be_resumed(tmp_path):
    folder = tmp_path/"run"
    process = start(BUSY, folder)
    assert runs.status(folder) == "running"
    with pytest.raises(ValueError, match=r"already holds a run \(running\)"): Run.create(folder, {})
    with pytest.raises(ValueError, match="another process"): Run.resume(folder)
    process.kill()
    process.wait()
    assert runs.status(folder) == "failed" and runs.read_json(folder/"run.json")["status"] == "running"
    assert Run.open(folder).metrics() == [{"step": 1}]
    with Run.resume(folder, bar=False) as run: run.log({"step": 2})
    assert run.status == "done" and run.metrics() == [{"step": 1}, {"step": 2}] and len(run.info["resumed"]) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_run_after_its_step(tmp_path, number):
    process = start(BUSY, tmp_path/"run")
    process.send_signal(number)
    assert process.wait(60) == 0 and runs.status(tmp_path/"run") == "interrupted"


def test_a_second_signal_interrupts_at_once(tmp_path):
    process = start(BUSY, tmp_path/"run", "deaf")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0 and runs.read_json(tmp_path/"run/run.json")["status"] == "interrupted"


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with Run.create(tmp_path/"run", {}, bar=False): assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_stopping_an_outer_run_stops_the_inner_one(tmp_path):
    with Run.create(tmp_path/"ablate", {}, bar=False) as outer:
        with Run.create(outer.folder/"arm-1", {}, bar=False) as inner:
            os.kill(os.getpid(), signal.SIGINT)
            assert inner.stop_requested()
        with Run.create(outer.folder/"arm-2", {}, bar=False) as late: assert late.stop_requested()
        assert outer.stop_requested()
    assert [r["status"] for r in runs.list_runs(tmp_path)] == ["interrupted"] * 3


def test_the_stop_file_is_seen_and_removed(tmp_path):
    with Run.create(tmp_path/"ablate", {}, bar=False) as outer, Run.create(outer.folder/"arm", {}, bar=False) as inner:
        (outer.folder/"stop").touch()
        assert inner.stop_requested()
    assert outer.status == "done", "nobody asked the outer run, so it came to its end"
    assert not (outer.folder/"stop").exists()


def test_a_run_on_another_machine_is_judged_by_its_heartbeat(tmp_path):
    with Run.create(tmp_path/"run", {}, bar=False) as run:
        runs.update(run.folder, host="elsewhere")
        assert run.status == "running"
        os.utime(run.folder/"run.json", (0, time.time() - runs.STALE - 1))
        assert run.status == "failed"
        run.progress("training", 1, 2)
        assert run.status == "running"


# ---- what a folder takes

def test_a_folder_with_a_run_or_its_files_is_refused(tmp_path):
    with Run.create(tmp_path/"run", {"a": 1}, bar=False): pass
    before = (tmp_path/"run/run.json").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run \(done\); choose another"): Run.create(tmp_path/"run", {})
    assert (tmp_path/"run/run.json").read_bytes() == before
    (tmp_path/"report.html").touch()
    with pytest.raises(ValueError, match="report.html"): Run.create(tmp_path, {})
    with pytest.raises(ValueError, match="is a file"): Run.create(tmp_path/"report.html", {})


def test_steps_are_logged_once(tmp_path):
    with Run.create(tmp_path/"run", {}, bar=False) as run:
        for step in 1, 2, 3:
            run.log({"step": step})
            run.record([{"step": step, "rollout": g} for g in range(2)])
        with pytest.raises(ValueError, match="step 3"): run.log({"step": 3})
        run.truncate_after(1)
        run.log({"step": 2})
        assert [r["step"] for r in run.metrics()] == [1, 2] and len(run.rollouts()) == 2
        run.truncate_after(0)
        run.log({"step": 1})


def test_progress_tells_of_the_busy_runs(tmp_path):
    assert runs.read_progress(tmp_path) is None
    with Run.create(tmp_path/"ablate", {}, bar=False) as outer:
        outer.progress("runs", 1, 9)
        for name in "dr2seg-0", "dr2seg-1", "dr2seg-2":
            with Run.create(outer.folder/name, {}, bar=False) as inner:
                inner.progress("training", 5, 60, "tokens 40")
                if name == "dr2seg-1": shown = runs.read_progress(outer.folder)
    assert (shown["stage"], shown["i"], shown["n"], shown["note"]) == ("runs", 1, 9, "dr2seg-1 training 5/60")
    assert runs.read_progress(outer.folder)["note"] == ""


# ---- checkpoints

def fill(text):
    def writer(folder):
        (folder/"deep").mkdir()
        (folder/"deep/adapter.safetensors").write_text(text)
    return writer


def test_checkpoints_keep_the_newest(tmp_path):
    for step in 5, 10, 15, 20: path = runs.save_checkpoint(tmp_path, step, fill(str(step)), keep=3)
    assert path.name == "step-000020" and runs.latest_checkpoint(tmp_path) == path
    assert sorted(p.name for p in (tmp_path/"checkpoints").iterdir()) == ["step-000010", "step-000015", "step-000020"]
    assert json.loads((path/"manifest.json").read_text())["step"] == 20
    runs.save_checkpoint(tmp_path, 20, fill("again"))
    assert (path/"deep/adapter.safetensors").read_text() == "again"


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    kept = runs.save_checkpoint(tmp_path, 5, fill("5"))
    def dies(folder):
        fill("10")(folder)
        raise OSError("disk full")
    with pytest.raises(OSError): runs.save_checkpoint(tmp_path, 10, dies)
    assert runs.latest_checkpoint(tmp_path) == kept
    assert runs.save_checkpoint(tmp_path, 15, fill("15")) == runs.latest_checkpoint(tmp_path)


@pytest.mark.parametrize("harm, words", [
    (lambda p: (p/"deep/adapter.safetensors").write_text("1O"), "adapter.safetensors differs"),
    (lambda p: (p/"deep/adapter.safetensors").unlink(), "adapter.safetensors is missing"),
    (lambda p: (p/"manifest.json").write_text("{"), "manifest.json is not valid JSON"),
    (lambda p: (p/"manifest.json").unlink(), "manifest.json is missing")])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, harm, words):
    older, newer = (runs.save_checkpoint(tmp_path, s, fill(str(s))) for s in (5, 10))
    harm(newer)
    with pytest.warns(UserWarning, match=words): assert runs.latest_checkpoint(tmp_path) == older
    harm(older)
    with pytest.warns(UserWarning): assert runs.latest_checkpoint(tmp_path) is None


def test_new_folders_do_not_collide(tmp_path):
    assert [runs.new_folder(tmp_path/"runs", "demo").name for _ in range(3)] == ["demo-1", "demo-2", "demo-3"]
