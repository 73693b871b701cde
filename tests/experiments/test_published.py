"""Every published training from its own files to the numbers in the table, by the command line.

Data as the peers publish them, models of the true classes with small random weights that were
taught one answer (see true_formats), segmenter and scorer likewise. Shapes are small; everything
else is the preset's.
"""

import json
import math
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from true_formats import (
    ANSWERS,
    write_clip,
    write_difficulties,
    write_dpad,
    write_qwen,
    write_reasonseg,
    write_reasonseg_of_the_hub,
    write_refcoco,
    write_sam2,
    write_seg_zero,
    write_visionreasoner,
)

import dr2seg_lib
from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.core.presets import published_presets, read_preset
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.report import write_report

DR2SEG = Path(sys.executable).parent / "dr2seg"
DATA = dict(  # preset: which set it is trained on
    visionreasoner_7k="several",
    dr2seg_7k="several",
    dr2seg_few_shot="reasonseg",
    dr2seg_star="reasonseg",
    seg_zero="single",
    pixelthink="single",
    dpad="captions",
)
SMALL = {
    "steps": 2,
    "rollout.questions_per_step": 2,
    "rollout.group_size": 3,
    "rollout.max_new_tokens": 120,
    "evaluation.samples": 2,
    "evaluation.every": 2,
    "evaluation.every_samples": 2,
    "lora.rank": 4,
}


def dr2seg(*words):
    done = subprocess.run([DR2SEG, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def given(**parameters):
    pairs = ((name, parameters[name]) for name in parameters)
    return [word for name, value in pairs for word in ("-p", name, value)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    models = {name: write_qwen(root / name, name) for name in ANSWERS}
    return dict(
        root=root,
        models=models,
        several=write_visionreasoner(root),
        single=write_seg_zero(root),
        captions=write_dpad(root),
        reasonseg=write_reasonseg(root),
        hub=write_reasonseg_of_the_hub(root),
        refcoco=write_refcoco(root),
        difficulties=write_difficulties(root),
        sam=write_sam2(root / "sam"),
        clip=write_clip(root / "clip"),
    )


def model_of(files, preset):
    "The small model that was taught what a preset's method asks for."
    return files["models"][read_preset(preset)["method"]["name"].removesuffix("_desc")]


def train(files, preset, name, **more):
    "A published training with small shapes on files of its own form."
    asked = SMALL | dict(model=model_of(files, preset), segmenter=files["sam"])
    asked |= dict(data=files[DATA[name]])
    if DATA[name] != "reasonseg":
        asked["evaluation.data"] = files["hub"]
    if name == "pixelthink":
        asked["data.difficulty"] = files["difficulties"]
    if name == "dpad":
        asked["method.scorer"] = files["clip"]
    if name == "dr2seg_star":
        asked["start"] = latest_checkpoint(files["root"] / "dr2seg_7k")
    out = files["root"] / preset.replace("+", "_with_")
    dr2seg("run", "train", "--preset", preset, *given(**asked | more), "--out", out)
    return out


def check_training(out, preset):
    run, published = Run.open(out), read_preset(preset)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert {row["lr"] for row in rows} == {published["optim"]["lr"]}
    assert any(row["grad_norm"] > 0 for row in rows)
    assert max(row["terms"]["answer_format"] for row in rows) > 0  # the format is met at times
    recorded = run.info["parameters"]
    assert recorded["optim"]["kl"] == published["optim"]["kl"]
    assert recorded["method"]["name"] == published["method"]["name"]
    results = read_json(out / "results.json")
    assert [results[when]["n"] for when in ("before", "after")] == [2, 2]


@pytest.mark.parametrize("preset", DATA)
def test_a_published_training_and_its_evaluation(files, preset):
    out = train(files, preset, preset)
    check_training(out, preset)
    measured = files["root"] / f"{preset}_measured"
    asked = dict(adapter=latest_checkpoint(out), model=model_of(files, preset))
    asked |= dict(data=files["hub"], segmenter=files["sam"])
    asked |= {"data.protocol": "visionreasoner", "rollout.max_new_tokens": 120}
    dr2seg("run", "evaluate", "--preset", preset, *given(**asked), "--out", measured)
    rows = read_jsonl(measured / "predictions.jsonl")
    assert len(rows) == 3
    assert any(row["iou"] > 0 for row in rows)  # masks are drawn, and some meet the target


def test_all_weights_in_place_of_an_adapter(files):
    preset = "visionreasoner_7k+full_tuning"
    out = train(files, preset, "visionreasoner_7k", **{"runtime.processes": 2})
    check_training(out, preset)
    assert (latest_checkpoint(out) / "weights.safetensors").is_file()


@pytest.mark.parametrize(("level", "asked"), [("instance", 3), ("expression", 6)])
def test_refcoco_by_object_and_by_expression(files, level, asked):
    out = files["root"] / f"refcoco_{level}"
    values = dict(model=files["models"]["seg_zero"], segmenter=files["sam"], data=files["refcoco"])
    values |= {"data.split": "testA", "data.level": level, "rollout.max_new_tokens": 120}
    dr2seg("run", "evaluate", "--preset", "seg_zero", *given(**values), "--out", out)
    assert len(read_jsonl(out / "predictions.jsonl")) == asked


def test_rea2seg_on_another_model(files):
    out, asked = files["root"] / "rea2seg", dict(model=files["models"]["visionreasoner"])
    asked |= dict(data=files["hub"], method="visionreasoner", segmenter=files["sam"])
    asked |= {"data.protocol": "visionreasoner", "rollout.max_new_tokens": 120}
    dr2seg("run", "rea2seg", *given(**asked), "--out", out)
    results = read_json(out / "results.json")
    assert results["summary"]["all"]["n"] == 3
    assert "chosen cIoU" in results["table"]


def test_what_was_run_is_measured_shown_and_inspected(files):
    root = files["root"]
    measured = [root / f"{preset}_measured" for preset in DATA]
    named = json.dumps([str(folder) for folder in measured])
    out = root / "discrimination"
    dr2seg("run", "discriminate", "-p", "runs", named, "-p", "scorer", files["clip"], "--out", out)
    found = read_json(out / "results.json")["discrimination"]
    assert set(found) == {folder.name for folder in measured}
    assert math.isfinite(found["dpad_measured"]["SNR"])  # of captions, by a CLIP of random weights
    trained = [root / preset for preset in DATA]
    told = dr2seg("tables", *measured, *trained, out)
    assert all(str(folder.name) in told for folder in measured)
    for folder in trained:
        page = write_report(folder).read_text()
        assert "rollout" in page
        assert len(inspect(folder).shown["entries"]) == SMALL["rollout.group_size"]
    for folder in measured:
        assert write_report(folder).stat().st_size > 10_000


PAGE = Path(dr2seg_lib.__file__).parents[1] / "docs" / "published.md"


def test_all_presets_are_here():
    "Those with 3B parameters differ in the model's name alone, see tests/core/test_config.py."
    names = {name for name in published_presets() if not name.endswith("_3b")}
    assert names == {*DATA, "embedded", "full_tuning"}
    assert all(f"--preset {name}" in PAGE.read_text() for name in DATA)


@cache
def parameters_of(experiment):
    return dr2seg("run", experiment, "--help").partition("Parameters of")[2]


def test_the_commands_of_the_page_name_what_exists():
    page = PAGE.read_text().replace("`RUN --", "`dr2seg run train --")
    commands = [shlex.split(text) for text in re.findall(r"`dr2seg run ([^`]+)`", page)]
    assert len(commands) > 12
    for experiment, *words in commands:
        for flag, value in zip(words, words[1:]):
            if flag == "--preset" and value != "NAME":
                assert set(value.split("+")) <= set(published_presets())
            if flag == "-p":
                assert re.search(rf"[\s.]{re.escape(value)}\s", parameters_of(experiment)), value
