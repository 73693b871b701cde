"The premise from the command line: of the embedded model, and of a folder of Qwen's own class."

import re
import subprocess
import sys
import time
from operator import lt
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer
from true_formats import write_qwen

from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.runs.status import run_status

DR2SEG = Path(sys.executable).parent / "dr2seg"
FORMS = "free", "empty", "concise", "long"


def command(out, *words):
    given = [w for pair in words for w in ("-p", *map(str, pair))]
    return [DR2SEG, "run", "premise", *given, "--out", out]


def chains(out, form):
    "What stands between the tags, read by hand."
    answers = [row["text"] for row in read_jsonl(out / f"predictions_{form}.jsonl")]
    return [re.match(r"<think>(.*?)(?:</think>|$)", text, re.DOTALL)[1] for text in answers]


def shares(out):
    "The table's second column, counted again from the masks' IoU."
    rows = {form: read_jsonl(out / f"predictions_{form}.jsonl") for form in FORMS}
    return {form: sum(r["iou"] >= 0.5 for r in part) / len(part) for form, part in rows.items()}


def told(out):
    lines = read_json(out / "results.json")["table"].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {form: float(right.split(",")[0]) for form, right, *_ in cells}


def kill_after(file, words, seconds=300):
    "SIGKILL to the command and its kernel, once a file is there."
    nothing, until = subprocess.DEVNULL, time.monotonic() + seconds
    with subprocess.Popen(words, stdout=nothing, stderr=nothing) as running:
        while not file.exists():
            assert running.poll() is None, "it came to its end"
            assert time.monotonic() < until, f"{file.name} was never written"
            time.sleep(0.02)
        family = psutil.Process(running.pid).children(recursive=True)
        for process in (*family, running):
            process.kill()
        psutil.wait_procs(family, timeout=30)  # their locks fall when they are gone


def test_killed_between_two_forms_it_goes_on_behind_the_first(tmp_path):
    out = tmp_path / "premise"
    words, first = command(out, ("samples", 6)), out / "predictions_free.jsonl"
    kill_after(first, words)
    assert run_status(out) == "failed"
    assert not (out / "results.json").exists()
    written = first.stat().st_mtime_ns
    subprocess.run([*words, "--resume"], check=True, capture_output=True)
    assert run_status(out) == "done"
    assert first.stat().st_mtime_ns == written
    assert told(out) == pytest.approx(shares(out), abs=6e-4)
    assert set(chains(out, "empty")) == {""}
    lengths = {form: [len(chain.split()) for chain in chains(out, form)] for form in FORMS}
    assert all(map(lt, lengths["concise"], lengths["long"]))


def test_a_model_of_qwens_class_is_kept_in_each_form(tmp_path):
    model, out = write_qwen(tmp_path / "qwen", "visionreasoner"), tmp_path / "premise"
    sizes = ("concise_tokens", 3), ("long_tokens", 60), ("max_new_tokens", 160)
    words = command(out, ("model", model), ("samples", 3), ("segmenter", "grabcut"), *sizes)
    subprocess.run(words, check=True, capture_output=True)
    assert set(chains(out, "empty")) == {""}
    assert all(re.fullmatch(r"[^.]+\.", chain) for chain in chains(out, "concise"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for free, long in zip(chains(out, "free"), chains(out, "long")):
        assert len(tokenizer(free)["input_ids"]) < 60 <= len(tokenizer(long)["input_ids"])
        assert long.startswith(f"{free} Wait,")
    assert told(out) == pytest.approx(shares(out), abs=6e-4)
