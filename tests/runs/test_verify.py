"What a checkpoint's run fills in, and what it may not."

import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from dr2seg_lib.cli import main
from dr2seg_lib.core.parameter_names import flat_parameters, nested_parameters
from dr2seg_lib.core.parameters import INHERITED, EvaluateConfig, TrainConfig
from dr2seg_lib.runs.verify import find_run_of, inherit, recorded_parameters, validate_adapter

TRAINED = {
    "model": "Qwen/Qwen2.5-VL-3B-Instruct",
    "method": "dpad",
    "segmenter": "grabcut",
    "model.dtype": "bfloat16",
    "model.quantize": "none",
    "rollout.max_new_tokens": 300,
    "data.max_question_tokens": 99,
}
OLD = dict(
    model="Qwen/Qwen2.5-VL-3B-Instruct",
    recipe="dpad",
    segmenter="grabcut",
    dtype="bfloat16",
    max_new_tokens=300,
    max_question_tokens=99,
    samples=8,
    split_of_another_version="x",
)  # as version 0.1 recorded it


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    "A checkpoint of a run that a training has recorded."
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "x" / "checkpoints" / "step-000060"
    folder.mkdir(parents=True)
    save_file({"w": np.zeros(1)}, folder / "weights.safetensors")
    write(folder, TrainConfig(norm_lr=0, **TRAINED).model_dump(mode="json"))
    return "runs/x/checkpoints/step-000060"


def write(folder, parameters, text=None):
    (folder.parents[1] / "run.json").write_bytes(
        json.dumps(dict(status="done", parameters=parameters)).encode() if text is None else text
    )


def test_torch_is_not_imported():
    code = """import sys, dr2seg_lib.runs.verify
print("torch" in sys.modules, "transformers" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_all_that_is_left_out_is_taken_from_the_run(checkpoint):
    found, sentence = inherit({"model.adapter": checkpoint, "runtime.batch_size": 4})
    given = {"model.adapter": checkpoint, "runtime.batch_size": 4}
    assert flat_parameters(found) == given | TRAINED
    assert sentence == (
        "from runs/x: model Qwen/Qwen2.5-VL-3B-Instruct, method dpad, segmenter grabcut, "
        "model.dtype bfloat16, model.quantize none, rollout.max_new_tokens 300, "
        "data.max_question_tokens 99"
    )
    assert EvaluateConfig(**found).flat().items() >= TRAINED.items()


def test_a_record_of_version_0_1_says_the_same(checkpoint, tmp_path):
    new, _ = inherit(dict(adapter=checkpoint))
    write(tmp_path / checkpoint, OLD)
    found, _ = inherit(dict(adapter=checkpoint))
    assert EvaluateConfig(**found) == EvaluateConfig(**new)


@pytest.mark.parametrize("name", INHERITED)
def test_what_is_given_has_precedence(checkpoint, name):
    value = EvaluateConfig().flat()[name] or "own.txt"  # of the prompt: its file
    given = {name: value, "model.adapter": checkpoint}
    found, sentence = inherit(given)
    assert flat_parameters(found) == TRAINED | given
    assert f"{name} " not in sentence


def test_empty_means_left_out(checkpoint):
    unsaid = dict(
        model="", recipe=None, segmenter="", dtype="", max_new_tokens=0, max_question_tokens=0
    )
    found, _ = inherit(dict(adapter=checkpoint, **unsaid))
    assert flat_parameters(found) == {"model.adapter": checkpoint} | TRAINED
    assert EvaluateConfig(**unsaid) == EvaluateConfig(), "without an adapter the defaults hold"


@pytest.mark.parametrize("given", [{}, {"model.adapter": ""}, {"model": "embedded"}])
def test_without_an_adapter_nothing_is_filled_in(given):
    assert inherit(given) == (nested_parameters(given), "")


@pytest.mark.parametrize(
    "text, why",
    [
        (b"", "is not valid JSON"),
        (b"[]", "is no record of a run"),
        (b"{}", 'field "status"'),
        (b'{"status": "done", "parameters": {"model": 7}}', "model cannot be 7"),
        (b'{"status": "done", "parameters": {"dtype": "int4"}}', "model.dtype cannot be 'int4'"),
        (
            b'{"status": "done", "parameters": {"max_new_tokens": -5}}',
            "rollout.max_new_tokens cannot be -5",
        ),
        (
            b'{"status": "done", "parameters": {"recipe": ["dr2seg"]}}',
            "method cannot be ['dr2seg']",
        ),
        (None, "run.json does not exist"),
    ],
    ids=str,
)
def test_a_record_that_cannot_be_read_leaves_the_defaults_and_says_so(
    checkpoint, tmp_path, text, why
):
    if text is None:
        (tmp_path / "runs/x/run.json").unlink()
    else:
        write(tmp_path / checkpoint, None, text)
    found, sentence = inherit(dict(adapter=checkpoint, recipe="dr2seg"))
    assert found == {"model": {"adapter": checkpoint}, "method": {"name": "dr2seg"}}
    assert why in sentence
    assert sentence.endswith(
        "the defaults hold where nothing is given "
        "(model, method.prompt, segmenter, model.dtype, model.quantize, rollout.max_new_tokens, "
        "data.max_question_tokens, data.max_pixels)"
    )


def test_code_that_a_record_names_is_not_run(checkpoint, tmp_path, capsys):
    (tmp_path / "evil.py").write_text("open('canary', 'w').close()")
    write(tmp_path / checkpoint, dict(recipe=f"{tmp_path}/evil.py:r"))
    with pytest.raises(
        ValueError,
        match="runs/x was trained by code of a file, method .*; look at it, then name it by method",
    ):
        inherit(dict(adapter=checkpoint))
    assert main(["run", "evaluate", "-p", "adapter", checkpoint]) == 2
    assert "code of a file" in capsys.readouterr().err
    assert main(["segment", "photo.jpg", "what?", "--adapter", checkpoint]) == 2
    assert "code of a file" in capsys.readouterr().err
    assert not (tmp_path / "canary").exists()
    found, _ = inherit(dict(adapter=checkpoint, recipe="mine.py:r"))
    assert found["method"]["name"] == "mine.py:r", "named by hand, it is the user's"


@pytest.mark.parametrize(
    "cwd, adapter, run",
    [
        (".", "runs/x/checkpoints/step-000060", "runs/x"),
        ("runs/x", "checkpoints/step-000060", "runs/x"),
        ("runs/x/checkpoints", "step-000060", "runs/x"),
        ("runs", "x/checkpoints/step-000060/", "runs/x"),
        ("runs/x/checkpoints/step-000060", ".", "runs/x"),
    ],
)
def test_a_run_is_found_from_any_folder(checkpoint, tmp_path, monkeypatch, cwd, adapter, run):
    monkeypatch.chdir(tmp_path / cwd)
    assert find_run_of(adapter).resolve() == tmp_path / run
    assert recorded_parameters(find_run_of(adapter)) == TRAINED


def test_an_adapter_that_lies_in_no_run_leaves_the_defaults(tmp_path, checkpoint):
    (tmp_path / checkpoint).rename(tmp_path / "copied")
    found, sentence = inherit(dict(adapter=str(tmp_path / "copied")))
    assert found == {"model": {"adapter": str(tmp_path / "copied")}}
    assert "lies in no run; the defaults hold" in sentence


@pytest.mark.parametrize("name", ["nowhere", "x" * 5000, "\0"])
def test_an_adapter_that_is_not_there(name):
    with pytest.raises(ValueError, match="does not exist; name a checkpoint"):
        validate_adapter(name)
