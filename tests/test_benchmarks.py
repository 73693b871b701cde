"The benchmarks, at a size that a CPU does in seconds."

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
TINY = "--side 112 --turns 1 --threads 1".split()


def run_tiny(script, folder, *options):
    "The result of a benchmark's run."
    command = [sys.executable, FOLDER / f"{script}.py", *options, "--out", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(folder.glob("*.json")).read_text())


def test_one_step_at_scale_runs_at_a_tiny_size(tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / "at_scale.py", "--tiny", "--out", tmp_path / "new" / "tiny.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "new" / "tiny.json").read_text())
    s = found["seconds"]
    assert set(s) == {"generation", "second", "reference", "update", "step"}
    assert s["step"] == pytest.approx(sum(v for k, v in s.items() if k != "step"), abs=0.01)
    assert found["tokens_per_second"]["step"] == pytest.approx(2 * 2 * 2 * 8 / s["step"], rel=0.02)
    assert found["peak_gib"]["resident"] > 0.1
    assert found["shape"]["image_tokens"] == 16
    assert found["shape"]["dtype"] == "bfloat16"
    assert len(found["rows"]) == 2


def test_the_large_size_is_qwens(monkeypatch):
    "Counted without drawing a weight; the hub's card says 8.29B parameters for Qwen2.5-VL-7B."
    monkeypatch.syspath_prepend(FOLDER)
    from at_scale import SEVEN
    from workload import make

    model, _ = make(840, size=SEVEN, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 8_292_166_656
    assert model.dtype == torch.bfloat16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, FOLDER / "at_scale.py"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no GPU here; --tiny shows the path on a CPU" in done.stderr


@pytest.mark.slow
def test_a_step_of_ours_and_of_the_loop_by_hand(tmp_path):
    size = "--prompts 2 --samples 2 --answer 4 --stages two --engines ours generate".split()
    found = run_tiny("against_trl", tmp_path, *size, *TINY)
    seconds = found["seconds"]["two-stage"]
    assert set(seconds["ratio"]) == {"generate"}
    stages = {"generation", "second", "reference", "update", "step"}
    assert set(seconds["ours"]) == stages
    assert set(seconds["generate"]) == stages
    assert (tmp_path / "against_trl_samples2_answer4_side112.json").exists()


@pytest.mark.slow
def test_uneven_answers_are_the_same_in_all_ways(tmp_path):
    size = "--prompts 2 --samples 4 --at-once 3 --shortest 2 --longest 12".split()
    found = run_tiny("uneven", tmp_path, *size, *TINY)
    assert found["answers_that_differ"] == 0
    assert set(found["ratio"]) == {"dropping", "waiting"}


@pytest.mark.slow
def test_evaluation_at_a_tiny_size(tmp_path):
    size = "--scenes 4 --batch-size 2 --turns 1 --threads 1".split()
    found = run_tiny("evaluation", tmp_path, *size)
    assert found["samples_per_second"]["answering"] >= found["samples_per_second"]["whole"] > 0
    assert found["summary"]["n"] == 4


@pytest.mark.slow
def test_prefix_grouper_says_the_same(tmp_path):
    pytest.importorskip("prefix_grouper")
    size = "--prompts 2 --samples 3 --answer 8 --shortest 3".split()
    found = run_tiny("against_prefix_grouper", tmp_path, *size, *TINY)
    assert max(found["largest_difference"].values()) < 1e-4


def test_slopes_of_powers(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    from growth import draw, slopes

    rows = []
    for v in (2, 4, 8):
        ours, trl = dict(step=v**0.5, mib=3.0 * v), dict(step=float(v), mib=v**2.0)
        rows.append(dict(factor="prompts", value=v, ours=ours, trl=trl))
    fitted = slopes(rows)["prompts"]
    assert fitted["step"]["ours"] == dict(whole=0.5, between=[0.5, 0.5])
    assert fitted["mib"]["trl"] == dict(whole=2.0, between=[2.0, 2.0])
    rows += [r | dict(factor="image tokens") for r in rows]
    draw(rows, slopes(rows), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_the_steps_on_paper_are_those_of_the_page():
    done = subprocess.run([sys.executable, FOLDER / "on_paper.py"], capture_output=True, text=True)
    assert done.stdout.count("\n| ") == 7, done.stderr
    assert done.stdout in (FOLDER.parent / "docs" / "performance.md").read_text()
