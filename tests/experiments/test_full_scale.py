"docs/full_scale.md: every command is one that the command line takes, and some are run."

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from true_formats import write_qwen, write_reasonseg_of_the_hub, write_sam2
from typer.main import get_command

from dr2seg_lib.cli import app
from dr2seg_lib.commands.parameters import validated_config
from dr2seg_lib.commands.parameters_cell import find_experiment
from dr2seg_lib.commands.prepare import given_parameters, without_preset
from dr2seg_lib.commands.run import RunRequest
from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.core.parameters import EvaluateConfig, TrainConfig
from dr2seg_lib.core.presets import evaluated_as, published_presets
from dr2seg_lib.evaluation.published import REINFORCED

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "full_scale.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("dr2seg ")]
JOBS = [line for line in LINES if line.startswith("sbatch ")]
DR2SEG = Path(sys.executable).parent / "dr2seg"


def check_command(name, *words):
    "Refuses what the command line would refuse before it looks at disks."
    asked = get_command(app).commands[name].make_context(name, list(words)).params
    if name != "run":
        return
    preset = asked["preset"] or ""
    assert set(preset.split("+")) <= {"", *published_presets()}
    notebook = find_experiment(asked["experiment"])
    request = RunRequest(asked["experiment"], asked["parameter"] or [], preset, asked["out"])
    values = given_parameters(request, notebook)
    if asked["experiment"] == "train":
        validated_config(TrainConfig, without_preset(values))
    if asked["experiment"] == "evaluate":
        values.pop("preset", None)
        validated_config(EvaluateConfig, evaluated_as(preset, values))


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_page_is_one(line):
    check_command(*shlex.split(line, comments=True)[1:])


def test_the_page_has_what_it_promises():
    assert len(COMMANDS) > 20
    assert len(JOBS) == 3
    for title in "One GPU", "Eight GPUs", "Two machines", "SLURM", "Ray", "vLLM":
        assert f"\n## {title}" in PAGE


@pytest.mark.parametrize("line", JOBS)
def test_a_job_of_the_page_is_one(line):
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(".sbatch"))
    assert (ROOT / words[script]).is_file()
    check_command("run", *words[script + 1 :])


def test_the_figures_of_the_page_are_those_of_the_papers():
    cells = r" \| ([\d.]+) \| (\S+) / (\S+)"
    rows = re.findall(rf"^\| (\S+){cells}{cells} \|", PAGE, re.M)
    assert len(rows) == 5
    for name, *figures in rows:
        assert (name.replace("\\", ""), *map(float, figures)) in REINFORCED


def run_line(line, names, *more):
    "Runs a command of the page, with small files in place of what it names."
    words = [names.get(word, word) for word in shlex.split(line)[1:]]
    done = subprocess.run(
        [DR2SEG, *map(str, words), *map(str, more)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_published_checkpoint_comes_first(tmp_path):
    "From the check of the set to the papers' table with the run's row in it."
    first = [line for line in COMMANDS if "first-look" in line or "ReasonSeg_val" in line]
    tables = next(line for line in COMMANDS if line.startswith("dr2seg tables"))
    names = {
        "Ricky06662/VisionReasoner-7B": write_qwen(tmp_path / "model", "visionreasoner"),
        "Ricky06662/ReasonSeg_val": write_reasonseg_of_the_hub(tmp_path),
        "runs/first-look": tmp_path / "look",
        "runs/vr-val": tmp_path / "look",
        "runs/vr-test": "--format=markdown",
    }
    check, evaluate = first
    assert "3 " in run_line(check, names)
    small = {"data.name": names["Ricky06662/ReasonSeg_val"], "rollout.max_new_tokens": 120}
    small["data.protocol"] = "visionreasoner"
    small["segmenter"] = write_sam2(tmp_path / "sam")
    run_line(evaluate, names, *(w for pair in small.items() for w in ("-p", *pair)))
    assert len(read_jsonl(tmp_path / "look" / "predictions.jsonl")) == 3
    assert "VisionReasoner" in run_line(tables, names)
