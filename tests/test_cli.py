"""The command as a user meets it.

Every test that runs an experiment runs a real notebook in a real kernel.
"""

import errno
import json
import os
import pty
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pydantic
import pytest

import dr2seg_lib
from dr2seg_lib.cli import main
from dr2seg_lib.commands.execute import PARTIAL_NOTEBOOK, explain_error
from dr2seg_lib.commands.parameter_help import parameters_help
from dr2seg_lib.commands.parameters import check_parameters, validated_config
from dr2seg_lib.commands.parameters_cell import (
    find_experiment,
    parameters_of,
    read_value,
    typed_parameters,
)
from dr2seg_lib.commands.prepare import prepare_run
from dr2seg_lib.commands.run import RunRequest
from dr2seg_lib.commands.summary import caution_lines, run_summary
from dr2seg_lib.core.files import read_json, write_json
from dr2seg_lib.core.notes import cut_note
from dr2seg_lib.core.parameter_names import flat_parameters
from dr2seg_lib.core.parameters import EvaluateConfig, Rea2SegConfig, TrainConfig
from dr2seg_lib.runs.run_folder import RECORDS, Run
from dr2seg_lib.runs.status import run_status, update_record
from dr2seg_lib.training.config import load_preset

DR2SEG = Path(sys.executable).parent / "dr2seg"
TRAIN = """
import time
from dr2seg_lib.runs.run_folder import Run
asked = {"steps": steps, "nap": nap, "recipe": recipe}
with (Run.resume(out) if resume else Run.create(out, asked)) as run:
    for step in range(len(run.metrics()) + 1, steps + 1):
        time.sleep(nap)
        run.log({"step": step})
        run.progress("training", step, steps, f"reward {step}")
        if run.stop_requested(): break
    else:
        figures = dict(gIoU=.7, cIoU=.6, answer_entropy=.5)
        run.results({"before": figures | {"tokens": 80}, "after": figures | {"tokens": 40}})
"""


@pytest.fixture
def notebook(tmp_path):
    "Writes a throwaway experiment."

    def make(
        *cells,
        parameters='steps = 3\nnap = 0.0\nrecipe = "dr2seg"\nout = ""\nresume = False',
        tags=("parameters",),
    ):
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(c) for c in (parameters, *cells)]
        )
        nb.cells[0].metadata["tags"] = list(tags)
        nbformat.write(nb, tmp_path / "toy.ipynb")
        return str(tmp_path / "toy.ipynb")

    return make


def dr2seg(folder, *args):
    return subprocess.run([DR2SEG, *args], cwd=folder, capture_output=True, text=True, timeout=300)


def start(folder, *args, until="progress.json"):
    "The command in the background, once its run has got somewhere."
    process = subprocess.Popen(
        [DR2SEG, *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(1200):
        if (folder / "out" / until).exists():
            return process
        time.sleep(0.1)
    process.kill()
    raise TimeoutError(process.communicate())


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- what is refused before anything starts


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["-p", "stpes", "60"], 'unknown parameter "stpes"; did you mean "steps"?'),
        (["-p", "colour", "red"], 'unknown parameter "colour"; known are steps, nap, recipe'),
        (["-p", "steps", "many"], "parameter \"steps\" takes int such as 3, not 'many'"),
        (["-p", "steps", "1.5"], 'parameter "steps" takes int such as 3, not 1.5'),
        (["-p", "out", "here"], 'parameter "out" is set by --out; use that option'),
        (["--resume"], "--resume needs the run's folder; name it with --out"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    tmp_path, notebook, monkeypatch, capsys, args, sentence
):
    path = notebook()
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    assert main(["run", path, *args]) == 2
    assert capsys.readouterr() == ("", f"dr2seg: {sentence}\n")
    assert files(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["toy.ipynb"]


@pytest.mark.parametrize(
    "args, says",
    [
        (["--preset", "few_shot"], 'unknown preset "few_shot"; did you mean "dr2seg_few_shot"'),
        (
            ["--preset", "dr2seg_few_shot"],
            "preset dr2seg_few_shot needs ReasonSeg's folder, by -p data PATH",
        ),
        (
            ["--preset", "dr2seg_few_shot", "-p", "data", "nowhere"],
            "data: nowhere does not exist; give the path of a data set, or its name on the hub. "
            "The embedded world is called mini.",
        ),
        (
            ["--preset", "visionreasoner_7k", "-p", "data", "mini", "-p", "eval_data", "nowhere"],
            "evaluation.data: nowhere does not exist",
        ),
        (
            [
                "--preset",
                "visionreasoner_7k",
                "-p",
                "data",
                "mini",
                "-p",
                "eval_data",
                "mini",
                "-p",
                "prompts",
                "many",
            ],
            'parameter "rollout.questions_per_step": input should be a valid integer',
        ),
        (["-p", "evaluation.data", "nowhere"], "evaluation.data: nowhere does not exist"),
    ],
)
def test_what_train_refuses(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "train", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dr2seg: ")
    assert err.count("\n") == 1
    assert says in err
    assert not list(tmp_path.iterdir())


def test_a_preset_is_for_train_and_what_is_typed_has_precedence(notebook, capsys):
    assert main(["run", notebook(), "--preset", "visionreasoner_7k"]) == 2
    assert "presets are for train" in capsys.readouterr().err
    given = {"preset": "visionreasoner_7k", "data": "mini", "eval_data": "mini", "lr": 0.5}
    filled = check_parameters("train", find_experiment("train"), given)
    assert filled["preset"] == "visionreasoner_7k"
    config = TrainConfig(**load_preset(filled["preset"], **filled["config"]))
    assert config.optim.lr == 0.5
    assert config.lora.rank == 64
    assert config.method.name == "visionreasoner"


def test_what_could_not_be_read_is_told_at_the_end(tmp_path):
    write_json(
        tmp_path / "results.json",
        dict(
            skipped={"a.json is broken; mend it.": 3, "b.json is broken; mend it.": 1},
            after=dict(broken=2),
        ),
    )
    assert run_summary(tmp_path).splitlines()[1:] == [
        "training records that cannot be read, passed over: 2, "
        "the first: a.json is broken; mend it. (all in results.json)",
        "evaluated records that cannot be read, counted as misses: 2 "
        "(they have an error in the predictions)",
    ]


def test_unknown_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "dr2seg_lib.commands.parameters_cell.experiments",
        lambda: {"train": Path("train.ipynb"), "ablate": Path("ablate.ipynb")},
    )
    for name, words in (
        ("trian", 'unknown experiment "trian"; did you mean "train"?'),
        ("xyz", "known are train, ablate"),
        ("x.ipynb", "notebook x.ipynb does not exist"),
    ):
        assert main(["run", name]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("tags, count", [((), 0), (("hide", "parameters"), 1)])
def test_parameters_cells_are_counted(notebook, tags, count):
    path = notebook(tags=tags)
    if count:
        assert parameters_of(path)["steps"] == 3
    else:
        with pytest.raises(ValueError, match="has 0 cells tagged parameters"):
            parameters_of(path)


class Config(pydantic.BaseModel, frozen=True, extra="forbid"):
    steps: int = pydantic.Field(3, ge=1)
    nap: float = 0
    recipe: str = "dr2seg"

    @pydantic.field_validator("recipe")
    def known(cls, value):
        if value not in ("dr2seg", "dpad"):
            raise ValueError(f'unknown recipe "{value}"; known are dr2seg, dpad')
        return value


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"recipe": "dr2sg"}, 'unknown recipe "dr2sg"; known are dr2seg, dpad'),
        ({"steps": 0}, 'parameter "steps": input should be greater than or equal to 1, not 0'),
    ],
)
def test_a_config_class_has_the_say(given, sentence):
    with pytest.raises(ValueError) as e:
        validated_config(Config, given)
    assert str(e.value) == sentence


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-5", 1e-5),
        ("-3", -3),
        ("[1, 2]", [1, 2]),
        ("None", None),
        ("FALSE", False),
        ("007", "007"),
        ("a b", "a b"),
        ("", ""),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_values_as_typed(text, value):
    assert read_value(text) == value


# ---- the command line itself


@pytest.mark.parametrize(
    "args, sentence",
    [
        ([], "missing command; see dr2seg --help"),
        (["rnu"], "no such command 'rnu'. Did you mean 'run'?; see dr2seg --help"),
        (["--outt"], "no such option: --outt; see dr2seg --help"),
        (["run"], "run needs the name of an experiment; see dr2seg run --help"),
        (["run", "train", "-p", "steps"], "option '-p' requires 2 arguments; see dr2seg --help"),
        (["run", "a", "b"], "got unexpected extra argument(s) (b); see dr2seg run --help"),
        (["check"], "missing argument 'DATA'; see dr2seg check --help"),
        (
            ["segment", "a.png", "--dtype", "half"],
            "invalid value for '--dtype': 'half' is not one of 'float32', 'bfloat16'; "
            "see dr2seg segment --help",
        ),
    ],
    ids=str,
)
def test_arguments_that_are_not_understood_are_one_sentence(capsys, args, sentence):
    assert main(args) == 2
    assert capsys.readouterr() == ("", f"dr2seg: {sentence}\n")


@pytest.mark.parametrize("typed", [["steps=0"], ["steps", "0"]])
def test_a_parameter_is_set_by_two_words_or_by_an_equals_sign(capsys, typed):
    assert main(["run", "train", "-p", *typed]) == 2
    assert 'parameter "steps": ' in capsys.readouterr().err


def test_a_value_may_hold_an_equals_sign(capsys):
    for typed in ["data=a=b"], ["data", "a=b"]:
        assert main(["run", "train", "-p", *typed]) == 2
        assert "data: a=b does not exist" in capsys.readouterr().err


def test_the_embedded_world_can_be_checked(capsys):
    assert main(["check", "mini"]) == 0
    assert "mini is the embedded world, drawn from seeds" in capsys.readouterr().out


def test_a_list_of_runs_is_no_wider_than_the_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    record = dict(status="failed", started="2026-01-01T09:30:00", error="out of words\n" * 90)
    for name in "a", "a-long-name":
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", record)
    monkeypatch.chdir(tmp_path)
    assert main(["runs", "."]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert {len(line) for line in lines} == {90}
    assert {line.index("failed") for line in lines} == {len("a-long-name  ")}


def test_a_value_may_start_with_a_minus_sign(capsys):
    "argparse took it for an option."
    assert main(["run", "train", "-p", "kl", "-1e999"]) == 2
    assert "kl" in capsys.readouterr().err.partition(":")[2]


@pytest.mark.parametrize(
    "command",
    ["run", "runs", "diff", "join", "check", "segment", "push", "app", "plan", "tables"],
)
def test_every_command_has_help(capsys, command):
    assert main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"Usage: dr2seg {command}" in out
    assert err == ""


def test_help_of_an_experiment_lists_its_parameters(notebook, capsys):
    assert main(["run", notebook(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "--trust" in out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["steps", "nap", "recipe"]


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dr2seg {dr2seg_lib.__version__}\n"


@pytest.mark.parametrize(
    "words, completed",
    [
        ("dr2seg se", ["segment"]),
        ("dr2seg run eval", ["evaluate"]),
        ("dr2seg run train --pre", ["--preset"]),
        ("dr2seg run train --preset dr2seg_f", ["dr2seg_few_shot", "dr2seg_few_shot_3b"]),
        ("dr2seg tables --format ", ["markdown", "latex", "html"]),
    ],
)
def test_the_shell_completes_words(words, completed):
    request = dict(
        _DR2SEG_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
    )
    done = subprocess.run([DR2SEG], env=os.environ | request, capture_output=True, text=True)
    assert done.stdout.split() == completed
    assert done.stderr == ""


# ---- quickly: before torch is imported


def told_quickly(folder, *args):
    "What a command says in a fresh process, in which torch cannot be imported."
    code = f"""import sys
sys.modules["torch"] = None
from dr2seg_lib import cli
raise SystemExit(cli.main({list(args)!r}))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_what_a_machine_lacks_is_found_without_transformers():
    "Data, weights and servers are looked at by a process that never imports what takes longest."
    heavy = "transformers", "peft", "open_clip", "sam2", "bitsandbytes"
    code = f"""import sys
for name in {heavy}:
    sys.modules[name] = None
from dr2seg_lib.core.parameters import EvaluateConfig, Rea2SegConfig, TrainConfig
from dr2seg_lib.evaluation.config import check_evaluation, check_rea2seg
from dr2seg_lib.training.config import check_training
check_training(TrainConfig())
check_evaluation(EvaluateConfig())
check_rea2seg(Rea2SegConfig())"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "args, says",
    [
        (["train", "-p", "lr", "inf"], 'parameter "optim.lr": input should be a finite number'),
        (
            ["train", "-p", "optim.lr", "1e999"],
            'parameter "optim.lr": input should be a finite number',
        ),
        (
            ["train", "-p", "steps", "0"],
            'parameter "steps": input should be greater than or equal to 1, not 0',
        ),
        (["train", "-p", "recipe", "x"], "method 'x' is unknown; use one of dpad, "),
        (
            ["train", "-p", "method", "nowhere.py:mine"],
            "method: nowhere.py does not exist; give the path of the file that holds mine",
        ),
        (["train", "-p", "model", "nope"], "model 'nope' is unknown"),
        (["train", "-p", "data", "nope"], "data: nope does not exist"),
        (["train", "-p", "eval_data", "nope"], "evaluation.data: nope does not exist"),
        (["train", "-p", "segmenter", "nope"], "segmenter: 'nope' is not known"),
        (
            ["train", "-p", "norm_lr", "0.1", "-p", "dtype", "bfloat16"],
            "dtype: bfloat16 would lose",
        ),
        (
            ["train", "--preset", "visionreasoner_7k", "-p", "lr", "inf"],
            'parameter "optim.lr": input should be a finite number',
        ),
        (
            ["train", "--preset", "visionreasoner_8k"],
            'unknown preset "visionreasoner_8k"; did you mean "visionreasoner_7k"?',
        ),
        (["train", "--preset", "dr2seg_few_shot"], "needs ReasonSeg's folder, by -p data PATH"),
        (["evaluate", "-p", "adapter", "nope"], "adapter nope does not exist"),
        (
            ["evaluate", "-p", "batch", "many"],
            'parameter "runtime.batch_size": input should be a valid integer',
        ),
        (
            ["rea2seg", "-p", "overlap", "2"],
            'parameter "candidates.overlap": input should be less than 1',
        ),
        (["ablate", "-p", "recipes", '["dr3seg"]'], "method 'dr3seg' is unknown"),
        (["ablate", "-p", "methods", "[]"], 'parameter "methods" is empty; give one or more'),
        (
            ["ablate", "-p", "settings", '{"lr": -1}'],
            'parameter "optim.lr": input should be greater than 0',
        ),
        (
            ["ablate", "-p", "config", '{"lrr": 1}'],
            'parameter "lrr": extra inputs are not permitted',
        ),
        (["ablate", "-p", "settings", "{1: 2}"], "a name is no text"),
        (
            ["ablate", "-p", "vary", '{"anchor": 25}'],
            'parameter "vary": anchor needs a list of values, not 25',
        ),
        (
            ["ablate", "-p", "vary", '{"anchor": [25, "many"]}'],
            'parameter "method.anchor": input should be a valid number',
        ),
        (["compare", "-p", "workers", "0"], 'parameter "workers" is 0; use 1 or more'),
        (
            ["compare", "-p", "seeds", "[-1]"],
            'parameter "seed": input should be greater than or equal to 0',
        ),
        (["conditioning", "-p", "model", "nope"], "model 'nope' is unknown"),
        (["conditioning", "-p", "data", "nope"], "data: nope does not exist"),
        (["conditioning", "-p", "adapters", '["nope"]'], "adapter nope does not exist"),
        (["conditioning", "-p", "samples", "many"], 'parameter "samples" takes int such as 256'),
        (
            ["warmstart_policy", "-p", "lr", "1e999"],
            'parameter "lr" cannot be inf; use finite numbers',
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_a_wrong_value_is_refused_without_torch(tmp_path, args, says):
    code, text = told_quickly(tmp_path, "run", *args)
    assert code == 2
    assert says in text
    assert text.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, says",
    [
        (["nothing.jpg", "what", "--model", "nope"], "model 'nope' is unknown"),
        (["nothing.jpg", "what", "--adapter", "nope"], "adapter nope does not exist"),
        (["nothing.jpg", "what", "--recipe", "x"], "method 'x' is unknown"),
    ],
)
def test_segment_refuses_names_without_torch(tmp_path, args, says):
    code, text = told_quickly(tmp_path, "segment", *args)
    assert code == 2
    assert says in text


@pytest.mark.parametrize(
    "args, limit",
    [
        (["run", "train", "-p", "lr", "inf"], 1.5),
        (["run", "evaluate", "-p", "adapter", "nope"], 1.5),
        (["runs"], 1),
        (["--help"], 0.5),
        (["run", "--help"], 1),
    ],
    ids=str,
)
def test_it_takes_about_a_second(tmp_path, args, limit):
    "CPU time of the whole process, which a busy machine leaves alone."
    code = f"""import resource, subprocess
subprocess.run({[str(DR2SEG), *args]!r}, cwd={str(tmp_path)!r}, capture_output=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)"""
    seconds = min(
        float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            ).stdout
        )
        for _ in range(2)
    )
    assert seconds < limit


# ---- odd notebooks, odd names


def written(folder, text):
    path = folder / "odd.ipynb"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


CELL = dict(
    cell_type="code",
    source="steps = 3",
    metadata=dict(tags=["parameters"]),
    outputs=[],
    execution_count=None,
)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"cells": 3}',
        b'{"cells": [3]}',
        b'{"cells": [{}]}',
        b"[" * 100_000,
        json.dumps(dict(cells=[CELL | dict(metadata=None)])),
        json.dumps(dict(cells=[CELL | dict(source=None)])),
        json.dumps(dict(cells=[CELL | dict(source=[1])])),
        json.dumps(dict(cells=[CELL | dict(metadata=dict(tags=3))])),
        json.dumps(dict(worksheets=[])),
    ],
    ids=lambda t: str(t[:40]),
)
def test_what_is_no_notebook_is_one_sentence(tmp_path, text, capsys):
    assert main(["run", str(written(tmp_path, text)), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "is no notebook" in err
    assert "save it again in Jupyter" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "cell, says",
    [
        ("steps = ", "the parameters cell is no Python"),
        ("%matplotlib inline", "the parameters cell is no Python"),
        ("steps = 3\0", "the parameters cell is no Python"),
        ("(" * 3000, "the parameters cell is no Python"),
        ("a, b = 1, 2", "line 1 of the parameters cell is not NAME = VALUE"),
        ("a = b = 1", "is not NAME = VALUE"),
        ("x.y = 1", "is not NAME = VALUE"),
        ("*a, = [1]", "is not NAME = VALUE"),
        ("x[0] = 1", "is not NAME = VALUE"),
        ("x = 1\nx += 1", "line 2 of the parameters cell is not NAME = VALUE"),
        ("steps: int", "parameter steps is no literal"),
        ("steps = range(3)", "parameter steps is no literal"),
        ("steps = {[]: 1}", "parameter steps is no literal"),
    ],
)
def test_an_odd_parameters_cell_is_one_sentence(notebook, cell, says, capsys, tmp_path):
    assert main(["run", notebook(parameters=cell), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "run").exists()


LONG = "x" * 5000


@pytest.mark.parametrize(
    "args",
    [
        [LONG],
        [LONG + ".ipynb"],
        ["train", "-p", LONG, "1"],
        ["train", "-p", "recipe", LONG],
        ["train", "-p", "recipe", f"{LONG}.py:r"],
        ["train", "-p", "model", LONG],
        ["train", "-p", "data", LONG],
        ["train", "-p", "lr", LONG],
        ["train", "-p", "segmenter", LONG],
        ["train", "--preset", LONG],
        ["train", "--out", LONG],
        ["train", "--resume", "--out", LONG],
        ["evaluate", "-p", "adapter", LONG],
        ["rea2seg", "-p", "scorer", LONG],
    ],
    ids=lambda a: " ".join(a).replace(LONG, "LONG"),
)
def test_names_that_no_disk_takes_are_one_sentence(tmp_path, monkeypatch, capsys, args):
    monkeypatch.chdir(tmp_path)
    assert main(["run", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dr2seg: ")
    assert err.count("\n") == 1
    assert len(err) < 1000
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args", [["--out", "a\udcff"], ["-p", "recipe", "a\udcff"], ["-p", "\udcff", "1"]]
)
def test_arguments_that_are_no_text_are_one_sentence(notebook, capsys, args):
    assert main(["run", notebook(), *args]) == 2
    assert "is not UTF-8; type it anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value", ["{[]: 1}", "(" * 5000, "9" * 5000, "{1, 2}", "...", "1j", "b'3'"]
)
def test_a_value_of_an_odd_kind_is_one_sentence(notebook, capsys, value):
    assert main(["run", notebook(), "-p", "steps", value]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert 'parameter "steps" takes int such as 3' in err
    assert len(err) < 300


def test_a_text_stays_a_text(notebook):
    declared = dict(recipe="dr2seg", steps=3)
    assert typed_parameters([("recipe", "1e-5"), ("steps", "1e3")], declared) == dict(
        recipe="1e-5", steps=1000.0
    )
    assert typed_parameters([("recipe", '"dpad"')], declared) == dict(recipe="dpad")


def test_a_terminal_that_cannot_show_a_name_shows_its_numbers(tmp_path):
    (tmp_path / "für").mkdir()
    done = subprocess.run(
        [DR2SEG, "runs", tmp_path / "für"],
        capture_output=True,
        env=os.environ | dict(PYTHONIOENCODING="ascii"),
    )
    assert done.returncode == 0
    assert b"f\\xfcr" in done.stdout
    assert not done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    Run.create(tmp_path / "run", {}, bar=False).finish("done")
    done = subprocess.run(
        f"{DR2SEG} runs {tmp_path} | true", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# ---- runs that cannot be read


def record(**changes):
    return json.dumps(
        dict(
            status="done",
            parameters={},
            started="2026-01-01T00:00:00",
            error=None,
            resumed=[],
            host="here",
        )
        | changes
    )


@pytest.mark.parametrize(
    "text, why",
    [
        (b"", "is not valid JSON"),
        (b"null", "is no record of a run"),
        (b"[1]", "is no record of a run"),
        (b"{}", 'field "status"'),
        (b"\xff\xfe{}", "is not valid JSON"),
        (record(status=3), 'field "status"'),
        (record(status="fine"), 'field "status"'),
        (record(parameters=[]), 'field "parameters"'),
        (record(parameters=None), 'field "parameters"'),
        (record(started=5), 'field "started"'),
        (record(error=[1]), 'field "error"'),
        (record(resumed="x"), 'field "resumed"'),
        (record(status="running", host=7), 'field "host"'),
    ],
    ids=str,
)
def test_one_bad_record_does_not_hide_the_other_runs(tmp_path, capsys, text, why):
    Run.create(tmp_path / "good", {}, bar=False).finish("done")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["runs", str(tmp_path)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert any("good" in line and "done" in line for line in lines)
    (bad,) = [line for line in lines if "/bad" in line]
    assert "unreadable" in bad
    assert why in bad


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("metrics.jsonl", b'{"step": 1}\nnonsense\n{"step": 3}\n', "unreadable"),
        ("metrics.jsonl", b"[1]\n", "unreadable"),
        ("metrics.jsonl", b'{"step": "one"}\n', "unreadable"),
        ("metrics.jsonl", b"\xff\xff\n\n", "unreadable"),
        ("metrics.jsonl", b'{"loss": 1}\n', "done"),
        ("progress.json", b"[]", "done"),
        ("progress.json", b"\xff", "done"),
        ("progress.json", b'{"stage": 1}', "done"),
    ],
    ids=str,
)
def test_bad_lines_of_one_run_do_not_hide_the_others(tmp_path, capsys, name, text, says):
    for folder in "bad", "good":
        Run.create(tmp_path / folder, {}, bar=False).finish("done")
    (tmp_path / "bad" / name).write_bytes(text)
    assert main(["runs", str(tmp_path)]) == 0
    lines = {Path(line.split()[0]).name: line for line in capsys.readouterr().out.splitlines()}
    assert says in lines["bad"]
    assert "done" in lines["good"]


def test_a_folder_for_a_record_and_a_run_that_vanishes(tmp_path, capsys, monkeypatch):
    Run.create(tmp_path / "good", {}, bar=False).finish("done")
    (tmp_path / "odd" / "run.json").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / "run.json").write_text(record())
    real = run_status

    def status(folder):
        if folder.name == "gone":
            (folder / "run.json").unlink()
        return real(folder)

    monkeypatch.setattr("dr2seg_lib.runs.listing.run_status", status)
    assert main(["runs", str(tmp_path)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert sum("unreadable" in line for line in lines) == 1


def test_a_record_that_may_not_be_read_is_unreadable():
    "As root nothing is forbidden, so the command gives its rights away first."
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for run in "bad", "good":
            Run.create(folder / run, {}, bar=False).finish("done")
        (folder / "bad" / "run.json").chmod(0)
        script = f"""import encodings.utf_8_sig, os, dr2seg_lib.commands.run_list
from dr2seg_lib import cli
os.geteuid() or os.seteuid(65534)
cli.main(["runs", {name!r}])"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    lines = {Path(line.split()[0]).name: line for line in done.stdout.splitlines()}
    assert "unreadable" in lines["bad"]
    assert "Permission denied" in lines["bad"]
    assert " done" in lines["good"]


def test_a_record_does_not_steer_the_terminal(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(
        record(status="failed", error="\x1b[31mred\x1b]0;title\x07\nfake line", started="\x1b[2J")
    )
    assert main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert out.count("\n") == 2


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{}", b'{"parameters": {"steps": 3}}', record(parameters=3).encode(), b"\xff"],
    ids=str,
)
def test_a_run_whose_record_cannot_be_read_is_not_resumed(tmp_path, notebook, capsys, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_bytes(text)
    assert main(["run", notebook(), "--resume", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "run.json" in err
    assert (tmp_path / "run" / "run.json").read_bytes() == text


@pytest.mark.parametrize(
    "name, text",
    [
        ("results.json", b"[]"),
        ("results.json", b"null"),
        ("results.json", b'{"arms": 3}'),
        ("results.json", b'{"gIoU": 1, "evaluation": 3}'),
        ("results.json", b'{"after": [1]}'),
        ("results.json", b'{"after": {"gIoU": "x"}}'),
        ("results.json", b'{"gIoU": 1, "evaluation": {"data": 3}}'),
        (
            "results.json",
            b'{"gIoU": 1, "n": 1, "strata": [], "evaluation": '
            b'{"data": "a", "format": "b", "split": "c", "protocol": "d"}}',
        ),
        ("run.json", b"[]"),
        ("run.json", b"{}"),
        ("run.json", b'{"parameters": []}'),
    ],
    ids=str,
)
def test_tables_of_a_malformed_run_are_one_sentence(tmp_path, capsys, name, text):
    Run.create(
        tmp_path / "run",
        dict(recipe="dr2seg", model="embedded", adapter="", segmenter="embedded"),
        bar=False,
    ).finish("done")
    (tmp_path / "run" / "results.json").write_text('{"gIoU": 1}')
    (tmp_path / "run" / name).write_bytes(text)
    assert main(["tables", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dr2seg: ")
    assert err.count("\n") == 1
    assert str(tmp_path / "run") in err


# ---- what the disk refuses


@pytest.mark.parametrize(
    "error, says",
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "out/.notebook.ipynb cannot be written (No space left on device); "
            "free space, or choose another folder with --out",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "out/x"),
            "out/x cannot be written (Permission denied); "
            "grant permission, or choose another folder with --out",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "gone/x"),
            "gone/x cannot be written (No such file or directory); "
            "restore gone, or choose another folder with --out",
        ),
        (OSError("a sentence; mend it"), "papermill failed: OSError: a sentence; mend it"),
        (TimeoutError("no answer"), "papermill failed: TimeoutError: no answer"),
    ],
)
def test_what_papermill_cannot_write_is_named(error, says):
    assert explain_error(error, Path("out")) == (says, 1)


def test_a_disk_that_is_full_for_papermill_and_the_record(tmp_path, notebook, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("papermill.execute_notebook", full)
    monkeypatch.setattr(Run, "create", full)
    assert main(["run", notebook(), "--out", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    (said,) = [line for line in err.splitlines() if line.startswith("dr2seg:")]
    assert "cannot be written (No space left on device); free space" in said
    assert "Traceback" not in err


def test_a_folder_that_is_deleted_while_its_run_is_going(tmp_path, notebook):
    path = notebook("open(out + '/here', 'w').close()\nimport shutil\nshutil.rmtree(out)")
    done = dr2seg(tmp_path, "run", path, "--out", "out")
    said = [line for line in done.stderr.splitlines() if line.startswith("dr2seg:")]
    assert done.returncode == 1
    assert len(said) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# ---- what the figures must not be read without


def test_cut_answers_and_the_split_are_told(tmp_path):
    write_json(
        tmp_path / "results.json",
        dict(
            table="the table",
            cut=0.125,
            evaluation=dict(split_note="a tenth of the ids, held out by their hash"),
        ),
    )
    assert run_summary(tmp_path).splitlines() == [
        "the table",
        "",
        "a tenth of the ids, held out by their hash",
        "12.5 % of the questions got an answer that max_new_tokens cut short, "
        "which is mostly a miss; raise max_new_tokens",
    ]


def test_what_the_table_says_is_not_said_twice(tmp_path):
    note = cut_note(dict(cut=1))
    write_json(tmp_path / "results.json", dict(table=f"the table\n\n{note}", cut=1))
    assert run_summary(tmp_path).count(note) == 1


@pytest.mark.parametrize("cut, told", [(0.01, False), (0.011, True), (None, False), ("x", False)])
def test_up_to_one_percent_is_silent(cut, told):
    assert bool(caution_lines(dict(before=dict(cut=cut), after={}))) is told
    if told:
        assert caution_lines(dict(before=dict(cut=cut)))[0].startswith(
            "before training: 1.1 % of the questions"
        )


@pytest.mark.parametrize(
    "results",
    [
        [],
        None,
        3,
        dict(before=3, after=[]),
        dict(before={}, after={}),
        dict(before=dict(gIoU="x"), after=dict(gIoU=[])),
    ],
    ids=str,
)
def test_results_of_any_form_have_a_summary(tmp_path, results):
    write_json(tmp_path / "results.json", results)
    run_summary(tmp_path)


# ---- runs


def test_a_run_from_start_to_table(tmp_path, notebook):
    done = dr2seg(tmp_path, "run", notebook(TRAIN), "-p", "steps", "5")
    out = tmp_path / "runs/toy-dr2seg-1"
    assert done.returncode == 0, done.stderr
    assert "training" in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1:] == [
        ["before", "after"],
        ["tokens", "80.0", "40.0"],
        ["gIoU", "0.700", "0.700"],
        ["cIoU", "0.600", "0.600"],
        ["answer", "entropy", "0.500", "0.500"],
    ]
    assert run_status(out) == "done"
    assert len(Run.open(out).metrics()) == 5
    executed = nbformat.read(out / "notebook.ipynb", as_version=4)
    assert any(
        "injected-parameters" in c.metadata.tags and "steps = 5" in c.source for c in executed.cells
    )
    assert not list(out.glob(".*.ipynb"))
    assert "toy-dr2seg-1" in dr2seg(tmp_path, "runs").stdout

    before = files(out)
    again = dr2seg(tmp_path, "run", notebook(TRAIN), "--out", str(out))
    assert again.returncode == 2
    assert "already holds a run (done)" in again.stderr
    assert files(out) == before
    resumed = dr2seg(tmp_path, "run", notebook(TRAIN), "--resume", "--out", str(out))
    assert resumed.returncode == 2
    assert "is done; only a run that ended early" in resumed.stderr


def test_one_bar_in_a_terminal(tmp_path, notebook):
    "A pseudo-terminal without a size, as containers have it."
    main, side = pty.openpty()
    process = subprocess.Popen(
        [DR2SEG, "run", notebook(TRAIN), "--out", "out"], cwd=tmp_path, stdout=side, stderr=side
    )
    os.close(side)
    text = b""
    try:
        while chunk := os.read(main, 4096):
            text += chunk
    except OSError:
        pass  # how a pseudo-terminal says that its other end was closed
    assert process.wait() == 0
    text = text.decode()
    assert "training: 100%|" in text
    assert "3/3" in text
    assert "reward 3" in text
    assert text.count("\n") <= 10, "the bar stays on its line"


def test_a_failed_cell(tmp_path, notebook):
    failed = dr2seg(tmp_path, "run", notebook(TRAIN, "1/0"), "--out", "out")
    assert failed.returncode == 1
    assert (
        "ZeroDivisionError: division by zero (cell 4; the traceback is in out/error.log)"
        in failed.stderr
    )
    assert "Traceback" not in failed.stderr
    assert "Traceback" in (tmp_path / "out/error.log").read_text()
    record = read_json(tmp_path / "out/run.json")
    assert record["status"] == "failed"
    assert record["error"].startswith("ZeroDivisionError")
    assert (tmp_path / "out/notebook.ipynb").exists()


def test_a_user_error_in_the_notebook_leaves_the_folder_free(tmp_path, notebook):
    path = notebook(
        "raise FileNotFoundError('weights w.safetensors do not exist;\\ncheck the path')"
    )
    for _ in range(2):
        failed = dr2seg(tmp_path, "run", path, "--out", "out")
        assert failed.returncode == 2
        assert (
            failed.stderr.splitlines()[-1]
            == "dr2seg: weights w.safetensors do not exist; check the path"
        )
    assert not [n for n in RECORDS if (tmp_path / "out" / n).exists()]
    assert "Traceback" in (tmp_path / "out/error.log").read_text()


def test_a_notebook_without_a_record_gets_one(tmp_path, notebook):
    assert dr2seg(tmp_path, "run", notebook("1 + 1"), "--out", "out").returncode == 0
    record = read_json(tmp_path / "out/run.json")
    assert record["status"] == "done"
    assert record["parameters"]["steps"] == 3


def test_a_config_refused_in_the_notebook_is_a_sentence(tmp_path):
    class Error(Exception):
        ename, exec_count, traceback = "ValidationError", 2, ["..."]

    Error.evalue = str(pytest.raises(pydantic.ValidationError, Config, recipe="x").value)
    assert explain_error(Error(), tmp_path) == (
        'recipe unknown recipe "x"; known are dr2seg, dpad',
        2,
    )


def test_a_killed_kernel(tmp_path, notebook):
    "Papermill would call these cells completed."
    killed = "step > 1 and os.kill(os.getpid(), 9)\n        run.log("
    code = "import os\n" + TRAIN.replace("break", "pass").replace("run.log(", killed)
    failed = dr2seg(tmp_path, "run", notebook(code), "--out", "out")
    assert failed.returncode == 1
    assert "dr2seg: the kernel was killed" in failed.stderr
    assert read_json(tmp_path / "out/run.json")["status"] == "failed"
    assert Run.open(tmp_path / "out").metrics() == [{"step": 1}]


def test_ctrl_c_then_resume(tmp_path, notebook):
    path = notebook(TRAIN)
    process = start(tmp_path, "run", path, "-p", "steps", "30", "-p", "nap", "0.2", "--out", "out")
    assert dr2seg(tmp_path, "run", path, "--out", "out").returncode == 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert f"go on with: dr2seg run {path} --resume --out out" in err
    run = Run.open(tmp_path / "out")
    done = len(run.metrics())
    assert run.status == "interrupted"
    assert 1 <= done < 30
    assert not (run.folder / "stop").exists()

    other = dr2seg(tmp_path, "run", path, "--resume", "--out", "out", "-p", "steps", "4")
    assert other.returncode == 2
    assert "was started with steps = 30, not 4" in other.stderr
    update_record(run.folder, parameters=run.info["parameters"] | {"nap": 0.0})  # to be quick
    resumed = dr2seg(tmp_path, "run", path, "--resume", "--out", "out", "-p", "steps", "30")
    assert resumed.returncode == 0, resumed.stderr
    assert run.status == "done"
    assert [r["step"] for r in run.metrics()] == list(range(1, 31))


def test_a_run_goes_on_in_another_number_of_processes(tmp_path, notebook):
    path = notebook("pass", parameters='steps = 3\nprocesses = 1\nout = ""\nresume = False')
    Run.create(
        tmp_path / "run", dict(steps=5, processes=4, out="run", resume=False), bar=False
    ).finish("interrupted")

    def resumed(*pairs):
        return prepare_run(RunRequest(path, pairs, out=tmp_path / "run", resume=True))[2]

    assert resumed() == dict(steps=5, processes=4)
    assert resumed(("processes", "2")) == dict(steps=5, processes=2)
    with pytest.raises(ValueError, match="was started with steps = 5, not 9"):
        resumed(("steps", "9"))


def test_a_second_ctrl_c_interrupts_a_deaf_notebook(tmp_path, notebook):
    process = start(
        tmp_path,
        "run",
        notebook("open(out + '/here', 'w').close()\nimport time\ntime.sleep(60)"),
        "--out",
        "out",
        until="here",
    )
    process.send_signal(signal.SIGINT)
    while not (tmp_path / "out/stop").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130
    assert run_status(tmp_path / "out") == "interrupted"


def test_check_counts_and_names_what_is_broken(tmp_path, capsys):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.png")
    good = dict(
        id="a", image="images/a.png", query="what is it?", polygon=[[[2, 2], [20, 2], [20, 20]]]
    )
    (tmp_path / "data.jsonl").write_text(json.dumps(good) + "\n")
    assert main(["check", str(tmp_path)]) == 0
    assert "nothing broken" in capsys.readouterr().out
    (tmp_path / "data.jsonl").write_text(
        json.dumps(good) + "\n" + json.dumps(good | dict(id="b", image="../a.png")) + "\n"
    )
    assert main(["check", str(tmp_path)]) == 1
    assert "1 broken:" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "nothing")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    "As root nothing is forbidden, so the command gives its rights away first."
    tmp_path.chmod(0o555)
    script = f"""import os, pydantic, dr2seg_lib.commands.run, dr2seg_lib.training.trainer
from dr2seg_lib import cli
if os.geteuid() == 0: os.seteuid(65534)
args = ["run", "train", "-p", "steps", "1", "--out", {str(tmp_path / "run")!r}]
code = cli.main(args)
os.seteuid(os.getuid())  # for what imported libraries remove at the end
raise SystemExit(code)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "run cannot be written (Permission denied); grant permission" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("train", "-p", "model"),
        ("evaluate", "-p", "model"),
        ("evaluate", "-p", "segmenter"),
        ("rea2seg", "-p", "model"),
        ("rea2seg", "-p", "scorer"),
    ],
    ids=" ".join,
)
def test_a_hub_that_no_network_leads_to_is_one_sentence(args, tmp_path, capsys):
    name = "facebook/sam2.1-hiera-tiny" if args[-1] == "segmenter" else "nobody/nothing"
    assert main(["run", *args, name, "--out", str(tmp_path / "run")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dr2seg:")]
    assert len(said) == 1
    assert f"{name} cannot be loaded (" in said[0]
    assert "connect to the hub" in said[0]


@pytest.mark.parametrize("experiment", ["train", "evaluate", "rea2seg"])
def test_a_checkpoint_that_lacks_a_shard_is_told_before_anything_starts(
    experiment, tmp_path, capsys
):
    (tmp_path / "model").mkdir()
    for name in "config.json", "tokenizer.json":
        (tmp_path / "model" / name).write_text("{}")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "model-00001-of-00002.safetensors"}}'
    )
    assert (
        main(
            [
                "run",
                experiment,
                "-p",
                "model",
                str(tmp_path / "model"),
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 2
    )
    assert (
        capsys.readouterr().err == f"dr2seg: model {tmp_path}/model is not whole "
        "(model-00001-of-00002.safetensors is missing); fetch it again\n"
    )
    assert not (tmp_path / "run").exists()


# ---- what a resume may do


def resumed(folder, *pairs, experiment="train", trust=False):
    "The parameters with which a run in `folder` would go on."
    return prepare_run(RunRequest(experiment, pairs, out=folder, resume=True, trust=trust))[2]


@pytest.fixture
def ended(tmp_path):
    "A training that ended early."
    Run.create(tmp_path / "run", TrainConfig(steps=9, lr=0.5).model_dump(), bar=False).finish(
        "failed", "FloatingPointError: the loss is not a number"
    )
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name, value",
    [
        ("optim.lr", 0.01),
        ("optim.schedule", "constant"),
        ("runtime.checkpoint_every", 3),
        ("evaluation.samples", 8),
        ("runtime.recorded_groups", 0),
        ("runtime.max_tokens", 1000),
        ("optim.kl", 0.0),
    ],
)
def test_a_resume_may_change_how_the_run_goes_on(name, value, ended):
    parameters = flat_parameters(resumed(ended, (name, str(value)))["config"])
    assert parameters[name] == value
    assert parameters["steps"] == 9


@pytest.mark.parametrize(
    "name, value",
    [
        ("lora.rank", "8"),
        ("method", "dpad"),
        ("seed", "1"),
        ("optim.norm_lr", "0"),
    ],
)
def test_a_resume_may_not_change_what_the_run_is(name, value, ended, capsys):
    assert main(["run", "train", "--resume", "--out", str(ended), "-p", name, value]) == 2
    said = capsys.readouterr().err
    assert f"{ended}: the run was started with {name} = " in said
    assert said.count("\n") == 1


def test_a_done_training_goes_on_with_more_steps_alone(ended):
    update_record(ended, status="done")
    for pairs in [], [("steps", "9")], [("steps", "8")], [("optim.lr", "0.1")]:
        with pytest.raises(ValueError, match="is done; .* or a training with more steps"):
            resumed(ended, *pairs)
    assert resumed(ended, ("steps", "12"))["config"]["steps"] == 12
    update_record(ended, status="running", pid=os.getpid())
    with Run.resume(ended, bar=False), pytest.raises(ValueError, match="is running"):
        resumed(ended, ("steps", "12"))


def test_a_done_run_whose_notebook_was_killed_goes_on(ended):
    update_record(ended, status="done")
    with pytest.raises(ValueError, match="is done; only a run that ended early"):
        resumed(ended)
    (ended / PARTIAL_NOTEBOOK).write_text("{}")
    assert resumed(ended)["config"]["steps"] == 9


RUNS_CODE = """from pathlib import Path
from dr2seg_lib.methods.dr2seg import dr2seg as mine
(Path(__file__).parent/'it-ran').touch()
"""


@pytest.mark.parametrize(
    "experiment, parameters",
    [
        (
            "train",
            lambda name: TrainConfig(method=name).model_dump(),
        ),
        (
            "ablate",
            lambda name: dict(
                recipes=["dr2seg", name],
                seeds=[0],
                steps=1,
                eval_samples=2,
                workers=1,
                vary={},
                settings={},
            ),
        ),
        (
            "ablate",
            lambda name: dict(
                recipes=["dr2seg"],
                seeds=[0],
                steps=1,
                eval_samples=2,
                workers=1,
                vary={"recipe": [name]},
                settings={},
            ),
        ),
    ],
)
def test_code_that_a_record_names_is_run_only_with_trust(experiment, parameters, tmp_path, capsys):
    (tmp_path / "rewards.py").write_text(RUNS_CODE)
    name = f"{tmp_path}/rewards.py:mine"
    Run.create(tmp_path / "run", parameters(name), bar=False).finish("interrupted")
    assert main(["run", experiment, "--resume", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "names code of a file, " in said
    assert "look at it, then add --trust" in said
    assert not (tmp_path / "it-ran").exists()
    resumed(tmp_path / "run", experiment=experiment, trust=True)
    assert (tmp_path / "it-ran").exists() == (experiment == "train"), (
        "a sweep's workers load it themselves"
    )
    if experiment == "train":
        config = resumed(tmp_path / "run", ("method", name))["config"]
        assert config["method"]["name"] == name, "who names the code trusts it"


# ---- a second SIGTERM, a record that goes


def test_a_second_sigterm_kills_a_notebook_that_is_stuck(tmp_path, notebook):
    stuck = TRAIN.replace(
        "time.sleep(nap)", "step > 1 and all(__import__('itertools').repeat(True))"
    )
    process = start(tmp_path, "run", notebook(stuck), "--out", "out")
    while not (tmp_path / "out/metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    while not (tmp_path / "out/stop").exists():
        time.sleep(0.1)
    time.sleep(1)
    assert process.poll() is None, "the first one only asks"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert run_status(tmp_path / "out") == "interrupted"
    assert Run.open(tmp_path / "out").metrics() == [{"step": 1}]


def test_a_record_deleted_while_the_run_is_at_work_is_one_sentence(tmp_path, notebook):
    failed = dr2seg(
        tmp_path,
        "run",
        notebook(
            TRAIN.replace(
                "run.progress(", "(run.folder/'run.json').unlink(missing_ok=True); run.progress("
            )
        ),
        "--out",
        "out",
    )
    assert failed.returncode == 1
    assert (
        "out/run.json was deleted or moved while the run was at work; restore it" in failed.stderr
    )
    assert "Traceback" not in failed.stderr
    assert (tmp_path / "out/metrics.jsonl").exists()


# ---- nested names, old names, help


def new_run(folder, experiment, *pairs):
    "What papermill would be given."
    return prepare_run(RunRequest(experiment, list(pairs), out=folder))[2]


@pytest.mark.parametrize(
    "given",
    [
        [("lora.rank", "8"), ("method", "dpad")],
        [("lora", '{"rank": 8}'), ("method.name", "dpad")],
        [("config", '{"lora": {"rank": 8}}'), ("method", "dpad")],
        [("rank", "8"), ("recipe", "dpad")],
    ],
    ids=["dotted", "a group", "config", "of version 0.1"],
)
def test_a_field_is_set_in_the_notebooks_config(tmp_path, given):
    values = new_run(tmp_path / "run", "train", *given)
    assert values == {"config": {"lora": {"rank": 8}, "method": {"name": "dpad"}}}


def test_old_names_are_told_in_one_line(tmp_path, capsys):
    new_run(tmp_path / "run", "train", ("rank", "8"), ("recipe", "dpad"))
    assert capsys.readouterr().err == (
        "dr2seg: rank is now lora.rank, recipe is now method; "
        "the old names go with the next release\n"
    )
    new_run(tmp_path / "run", "train", ("lora.rank", "8"), ("data", "mini"))
    assert capsys.readouterr().err == ""


def test_a_sweep_shares_a_config(tmp_path):
    values = new_run(
        tmp_path / "run", "ablate", ("seeds", "[0]"), ("steps", "3"), ("lora.rank", "4")
    )
    assert values["seeds"] == [0]
    assert flat_parameters(values["config"]) == {"steps": 3, "lora.rank": 4}


def test_a_sweep_takes_a_preset(tmp_path, capsys):
    asked = ["run", "ablate", "--preset", "dr2seg_few_shot", "--out", str(tmp_path / "run")]
    assert main(asked) == 2
    assert "preset dr2seg_few_shot needs ReasonSeg's folder" in capsys.readouterr().err
    values = new_run(tmp_path / "run", "ablate", ("preset", "dr2seg_7k"), ("steps", "3"))
    assert values["preset"] == "dr2seg_7k"
    assert values["config"] == {"steps": 3}


def test_a_sweep_of_version_0_1_goes_on(tmp_path, capsys):
    old = dict(recipes=["dr2seg"], seeds=[0], steps=3, eval_samples=2, workers=1, vary={})
    Run.create(tmp_path / "run", old | dict(settings={"rank": 4}), bar=False).finish("interrupted")
    values = resumed(tmp_path / "run", experiment="ablate")
    assert values["methods"] == ["dr2seg"]
    assert flat_parameters(values["config"]) == {
        "steps": 3,
        "evaluation.samples": 2,
        "lora.rank": 4,
    }
    assert resumed(tmp_path / "run", ("workers", "3"), experiment="ablate")["workers"] == 3
    with pytest.raises(ValueError, match="was started with lora.rank = 4, not 8"):
        resumed(tmp_path / "run", ("lora.rank", "8"), experiment="ablate")


def test_which_arms_are_compared_may_change_on_a_resume(tmp_path):
    "What a sweep says of itself at its end is no part of its runs, and old runs did not record it."
    begun = dict(methods=["seg_zero", "dpad"], seeds=[0], preset="", config={}, workers=1)
    Run.create(tmp_path / "run", begun, bar=False).finish("interrupted")
    pairs = '{"dpad": "seg_zero"}'
    values = resumed(tmp_path / "run", ("against", pairs), experiment="compare")
    assert values["against"] == {"dpad": "seg_zero"}


def test_a_training_of_version_0_1_goes_on(tmp_path):
    old = dict(recipe="dpad", rank=4, steps=9, lr=0.5, out="x", resume=False)
    Run.create(tmp_path / "run", old, bar=False).finish("failed")
    found = flat_parameters(resumed(tmp_path / "run", ("optim.lr", "0.1"))["config"])
    assert found == {"method": "dpad", "lora.rank": 4, "steps": 9, "optim.lr": 0.1}


@pytest.mark.parametrize(
    "experiment, kind",
    [("train", TrainConfig), ("evaluate", EvaluateConfig), ("rea2seg", Rea2SegConfig)],
)
def test_help_names_every_field_with_its_default(experiment, kind):
    lines = parameters_help(experiment).splitlines()
    assert max(map(len, lines)) <= 100
    words = {
        line.split()[0]: line.split()[1]
        for line in lines
        if line.startswith("  ") and line[2:3].strip()
    }
    for name, value in kind().flat().items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            assert float(words[name]) == value
        else:
            assert name in words


def test_a_preset_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('method = "dpad"\nsteps = 20\n[lora]\nrank = 8\n')
    request = RunRequest("train", [("lora.rank", "4")], preset=str(path), out=tmp_path / "run")
    values = prepare_run(request)[2]
    assert values == {"preset": str(path), "config": {"lora": {"rank": 4}}}
    config = TrainConfig(**load_preset(values["preset"], **values["config"]))
    assert (config.method.name, config.steps, config.lora.rank) == ("dpad", 20, 4)


def test_help_of_a_training_lists_the_presets():
    assert "dr2seg_few_shot" in parameters_help("train")
    assert "dr2seg_few_shot" not in parameters_help("evaluate")


def test_a_sweep_and_a_search_take_a_cluster_by_its_dotted_names():
    for experiment, address in dict(ablate="auto", compare="10.0.0.1:6379", tune="local").items():
        path = find_experiment(experiment)
        given = {"cluster.address": address, "cluster.cpus": 2, "steps": 3}
        values = check_parameters(experiment, path, given)
        assert values["cluster"] == dict(address=address, cpus=2)
        assert values["config"] == dict(steps=3)
    assert check_parameters("tune", path, {"cluster.cpus": 2})["cluster"]["address"] == "local"


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"cluster.address": "head"}, "cluster.address is 'head'; use auto, local or HOST:PORT"),
        ({"cluster.gpus": -1}, 'parameter "cluster.gpus": input should be greater than or equal'),
        ({"cluster.nodes": 2}, 'unknown parameter "cluster.nodes"'),
    ],
)
def test_what_no_cluster_can_be_is_refused(given, sentence):
    with pytest.raises(ValueError) as refused:
        check_parameters("ablate", find_experiment("ablate"), given)
    assert sentence in str(refused.value)
