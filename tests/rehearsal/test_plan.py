"Memory against what a CPU holds; settings that fit; the command."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dr2seg_lib.cli import main
from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.rehearsal import plan as planning
from dr2seg_lib.rehearsal.answers import AnswerLengths
from dr2seg_lib.rehearsal.gpus import find_gpu, usable_gib
from dr2seg_lib.rehearsal.plan import PlanRequest, deep_peaks, nearest_setting, plan_config
from dr2seg_lib.rehearsal.step import rehearse_training

STEP = Path(__file__).parent / "benchmark_step.py"
SMALL = {
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "model.dtype": "bfloat16",
    "optim.norm_lr": 0.0,
    "rollout.questions_per_step": 2,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 48,
    "evaluation.samples": 2,
}
REQUEST = PlanRequest(lengths=AnswerLengths(32, 8), side=112)


@pytest.mark.slow
def test_the_peak_is_that_of_a_cpu():
    "The benchmark's step; malloc gives back what is freed, as its default does not."
    keep = {f"MALLOC_{name}_THRESHOLD_": "262144" for name in ("MMAP", "TRIM")}
    command = [sys.executable, str(STEP)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | keep
    )
    measured = json.loads(done.stdout)
    sys.path.insert(0, str(STEP.parent))
    from benchmark_step import rehearsed

    assert rehearsed()[0] == pytest.approx(measured, rel=0.15)


def test_shallow_models_tell_the_peaks_of_a_deep_one():
    config = plan_config("", SMALL, 1)
    told = deep_peaks(config, REQUEST, 7)
    deep = rehearse_training(config, REQUEST.lengths, 7, REQUEST.side).device.account.peaks
    for stage in "first", "second", "reference", "update", "evaluation":
        assert told[stage] == pytest.approx(deep[stage] / 2**30, rel=0.02)


def peaks_by_setting(config, request, layers):
    "An update that takes 40 GiB, less by checkpointing and by short microbatches."
    runtime = config.runtime
    size = 20 if runtime.gradient_checkpointing else 40
    return dict(first=4.0, update=size * runtime.max_tokens / 2048)


def test_the_nearest_setting_is_found(monkeypatch):
    monkeypatch.setattr(planning, "deep_peaks", peaks_by_setting)
    config = plan_config("", SMALL, 1)
    peaks = peaks_by_setting(config, None, 0)
    asked = PlanRequest(gpu="rtx4080")
    changed = nearest_setting(config, asked, peaks, 28)
    assert changed == {"runtime.gradient_checkpointing": True, "runtime.max_tokens": 1024}
    assert nearest_setting(config, PlanRequest(gpu="h200"), peaks, 28) == {}


@pytest.mark.slow
def test_the_setting_that_is_found_fits():
    "The 7B's plain weights are more than a GPU of 16 GB holds; what is named fits there."
    config, request = plan_config("", SMALL, 1), replace(REQUEST, gpu="rtx4080")
    usable = usable_gib(find_gpu("rtx4080"))
    as_asked = deep_peaks(config, request, 28)
    assert min(as_asked.values()) > usable
    changed = nearest_setting(config, request, as_asked, 28, weights=15.4)
    assert changed["model.quantize"] == "nf4"
    peaks = deep_peaks(TrainConfig(**config.flat() | changed), request, 28)
    assert max(peaks.values()) <= usable


def test_what_never_fits_is_said(monkeypatch):
    monkeypatch.setattr(planning, "deep_peaks", lambda *_: dict(reward=500.0))
    config = plan_config("", SMALL, 1)
    assert nearest_setting(config, PlanRequest(), dict(reward=500.0), 28) is None


def test_several_processes_share_the_questions():
    alone, many = (
        rehearse_training(plan_config("", SMALL, n), REQUEST.lengths, 1, REQUEST.side)
        for n in (1, 2)
    )
    assert many.device.account.peaks["first"] < alone.device.account.peaks["first"]
    assert many.reduced > 2 * many.trained / 3 > alone.reduced


def test_the_command_writes_a_plan(tmp_path, capsys):
    out = tmp_path / "plan.json"
    given = ["-p", "rollout.max_new_tokens", "40", "-p", "rollout.questions_per_step", "2"]
    assert main(["plan", "train", *given, "--answer", "30", "--out", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["asked"]["gpu"] == "h200"
    assert plan["fits"]
    assert {row["stage"] for row in plan["stages"]} >= {"first", "second", "update"}
    shown = capsys.readouterr().out
    assert "it fits" in shown
    assert "waits" in shown


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--gpu", "h20"], "h200"),
        (["-p", "runtime.processes", "2"], "--gpus"),
        (["--preset", "nope"], "unknown preset"),
        (["--gpus", "3"], "multiple"),
        (["-p", "model", "Qwen/Qwen2.5-VL-72B-Instruct"], "sizes"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(argv, says, capsys):
    assert main(["plan", "train", *argv]) == 2
    assert says in capsys.readouterr().err
