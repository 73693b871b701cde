"The benchmarks, at a size that a CPU does in seconds."

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


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
