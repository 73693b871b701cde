"The command as a user meets it: every test that runs an experiment runs a real notebook in a real kernel."
import json, os, pty, signal, subprocess, sys, time
from pathlib import Path
import nbformat, pydantic, pytest
from dr2seg_lib import cli, runs

DR2SEG = Path(sys.executable).parent/"dr2seg"
TRAIN = """
import time
from dr2seg_lib.runs import Run
with (Run.resume(out) if resume else Run.create(out, {"steps": steps, "nap": nap, "recipe": recipe})) as run:
    for step in range(len(run.metrics()) + 1, steps + 1):
        time.sleep(nap)
        run.log({"step": step})
        run.progress("training", step, steps, f"reward {step}")
        if run.stop_requested(): break
    else: run.results({w: dict(tokens=80 / n, gIoU=.7, cIoU=.6, answer_entropy=.5) for n, w in ((1, "before"), (2, "after"))})
"""


@pytest.fixture
def notebook(tmp_path):
    "Writes a throwaway experiment."
    def make(*cells, parameters='steps = 3\nnap = 0.0\nrecipe = "dr2seg"\nout = ""\nresume = False', tags=("parameters",)):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (parameters, *cells)])
        nb.cells[0].metadata["tags"] = list(tags)
        nbformat.write(nb, tmp_path/"toy.ipynb")
        return str(tmp_path/"toy.ipynb")
    return make


def dr2seg(folder, *args):
    return subprocess.run([DR2SEG, *args], cwd=folder, capture_output=True, text=True, timeout=300)


def start(folder, *args, until="progress.json"):
    "The command in the background, once its run has got somewhere."
    process = subprocess.Popen([DR2SEG, *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(1200):
        if (folder/"out"/until).exists(): return process
        time.sleep(0.1)
    process.kill()
    raise TimeoutError(process.communicate())


def files(folder): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- what is refused before anything starts

@pytest.mark.parametrize("args, sentence", [
    (["-p", "stpes", "60"], 'unknown parameter "stpes"; did you mean "steps"?'),
    (["-p", "colour", "red"], 'unknown parameter "colour"; known are steps, nap, recipe'),
    (["-p", "steps", "many"], "parameter \"steps\" takes int such as 3, not 'many'"),
    (["-p", "steps", "1.5"], 'parameter "steps" takes int such as 3, not 1.5'),
    (["-p", "out", "here"], 'parameter "out" is set by --out; use that option'),
    (["--resume"], "--resume needs the run's folder; name it with --out"),
    (["--resume", "--out", "nowhere"], "nowhere/run.json does not exist; check the run folder's name")])
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, notebook, monkeypatch, capsys, args, sentence):
    path = notebook()
    monkeypatch.chdir(tmp_path)
    before = files(tmp_path)
    assert cli.main(["run", path, *args]) == 2
    assert capsys.readouterr() == ("", f"dr2seg: {sentence}\n")
    assert files(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["toy.ipynb"]


@pytest.mark.parametrize("args, says", [
    (["--preset", "few_shot"], 'unknown preset "few_shot"; did you mean "reasonseg_few_shot"?'),
    (["--preset", "reasonseg_few_shot"], "preset reasonseg_few_shot needs ReasonSeg's folder; name it by data"),
    (["--preset", "reasonseg_few_shot", "-p", "data", "nowhere"], "data: nowhere does not exist; give the path of a data set, or its name on the hub. The embedded world is called mini."),
    (["--preset", "visionreasoner_7k", "-p", "data", "mini", "-p", "eval_data", "nowhere"], "eval_data: nowhere does not exist"),
    (["--preset", "visionreasoner_7k", "-p", "data", "mini", "-p", "eval_data", "mini", "-p", "prompts", "many"], 'parameter "prompts": input should be a valid integer'),
    (["-p", "eval_data", "nowhere"], "eval_data: nowhere does not exist")])
def test_what_train_refuses(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "train", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("dr2seg: ") and err.count("\n") == 1 and says in err and not list(tmp_path.iterdir())


def test_a_preset_is_for_train_and_what_is_typed_has_precedence(notebook, capsys):
    assert cli.main(["run", notebook(), "--preset", "visionreasoner_7k"]) == 2 and "presets are for train" in capsys.readouterr().err
    given = dict(data="mini", eval_data="mini", lr=0.5)
    filled = cli.check_parameters("train", cli.find_experiment("train"), cli.with_preset("train", "visionreasoner_7k", given))
    assert filled["lr"] == 0.5 and filled["rank"] == 64 and filled["recipe"] == "dr2seg_desc"


def test_what_could_not_be_read_is_told_at_the_end(tmp_path):
    runs.write_json(tmp_path/"results.json", dict(skipped={"a.json is broken; mend it.": 3, "b.json is broken; mend it.": 1}, after=dict(broken=2)))
    assert cli.summary(tmp_path).splitlines()[1:] == [
        "training records that cannot be read, passed over: 2, the first: a.json is broken; mend it. (all in results.json)",
        "evaluated records that cannot be read, counted as misses: 2 (they have an error in the predictions)"]


def test_unknown_experiments(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "experiments", lambda: {"train": Path("train.ipynb"), "ablate": Path("ablate.ipynb")})
    for name, words in ("trian", 'unknown experiment "trian"; did you mean "train"?'), ("xyz", "known are train, ablate"), \
                       ("x.ipynb", "notebook x.ipynb does not exist"):
        assert cli.main(["run", name]) == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("tags, count", [((), 0), (("hide", "parameters"), 1)])
def test_parameters_cells_are_counted(notebook, tags, count):
    path = notebook(tags=tags)
    if count: assert cli.parameters_of(path)["steps"] == 3
    else:
        with pytest.raises(ValueError, match="has 0 cells tagged parameters"): cli.parameters_of(path)


class Config(pydantic.BaseModel, frozen=True, extra="forbid"):
    steps: int = pydantic.Field(3, ge=1)
    nap: float = 0
    recipe: str = "dr2seg"

    @pydantic.field_validator("recipe")
    def known(cls, value):
        if value not in ("dr2seg", "dpad"): raise ValueError(f'unknown recipe "{value}"; known are dr2seg, dpad')
        return value


@pytest.mark.parametrize("given, sentence", [
    ({"recipe": "dr2sg"}, 'unknown recipe "dr2sg"; known are dr2seg, dpad'),
    ({"steps": 0}, 'parameter "steps": input should be greater than or equal to 1, not 0')])
def test_a_config_class_has_the_say(notebook, monkeypatch, given, sentence):
    monkeypatch.setitem(cli.CONFIGS, "toy", f"{__name__}:Config")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Config.__module__])
    path = Path(notebook())
    assert cli.check_parameters("toy", path, {"steps": 9}) == {"steps": 9}
    with pytest.raises(ValueError) as e: cli.check_parameters("toy", path, given)
    assert str(e.value) == sentence


@pytest.mark.parametrize("text, value", [("1e-5", 1e-5), ("-3", -3), ("[1, 2]", [1, 2]), ("None", None), ("FALSE", False),
                                         ("007", "007"), ("a b", "a b"), ("", ""), ("__import__('os')", "__import__('os')")])
def test_values_as_typed(text, value): assert cli.read_value(text) == value


# ---- runs

def test_a_run_from_start_to_table(tmp_path, notebook):
    done = dr2seg(tmp_path, "run", notebook(TRAIN), "-p", "steps", "5")
    out = tmp_path/"runs/toy-dr2seg-1"
    assert done.returncode == 0, done.stderr
    assert "training" in done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[1:] == [["before", "after"], ["tokens", "80.0", "40.0"], ["gIoU", "0.700", "0.700"],
                         ["cIoU", "0.600", "0.600"], ["answer", "entropy", "0.500", "0.500"]]
    assert runs.status(out) == "done" and len(runs.Run.open(out).metrics()) == 5
    executed = nbformat.read(out/"notebook.ipynb", as_version=4)
    assert any("injected-parameters" in c.metadata.tags and "steps = 5" in c.source for c in executed.cells)
    assert not list(out.glob(".*.ipynb")) and "toy-dr2seg-1" in dr2seg(tmp_path, "runs").stdout

    before = files(out)
    again = dr2seg(tmp_path, "run", notebook(TRAIN), "--out", str(out))
    assert again.returncode == 2 and "already holds a run (done)" in again.stderr and files(out) == before
    resumed = dr2seg(tmp_path, "run", notebook(TRAIN), "--resume", "--out", str(out))
    assert resumed.returncode == 2 and "is done; only a run that ended early" in resumed.stderr


def test_one_bar_in_a_terminal(tmp_path, notebook):
    "A pseudo-terminal without a size, as containers have it."
    main, side = pty.openpty()
    process = subprocess.Popen([DR2SEG, "run", notebook(TRAIN), "--out", "out"], cwd=tmp_path, stdout=side, stderr=side)
    os.close(side)
    text = b""
    try:
        while chunk := os.read(main, 4096): text += chunk
    except OSError: pass     # how a pseudo-terminal says that its other end was closed
    assert process.wait() == 0
    text = text.decode()
    assert "training: 100%|" in text and "3/3" in text and "reward 3" in text
    assert text.count("\n") <= 10, "the bar stays on its line"


def test_a_failed_cell(tmp_path, notebook):
    failed = dr2seg(tmp_path, "run", notebook(TRAIN, "1/0"), "--out", "out")
    assert failed.returncode == 1 and "ZeroDivisionError: division by zero (cell 4; the traceback is in out/error.log)" in failed.stderr
    assert "Traceback" not in failed.stderr and "Traceback" in (tmp_path/"out/error.log").read_text()
    record = runs.read_json(tmp_path/"out/run.json")
    assert record["status"] == "failed" and record["error"].startswith("ZeroDivisionError")
    assert (tmp_path/"out/notebook.ipynb").exists()


def test_a_user_error_in_the_notebook_leaves_the_folder_free(tmp_path, notebook):
    path = notebook("raise FileNotFoundError('weights w.safetensors do not exist;\\ncheck the path')")
    for _ in range(2):
        failed = dr2seg(tmp_path, "run", path, "--out", "out")
        assert failed.returncode == 2
        assert failed.stderr.splitlines()[-1] == "dr2seg: weights w.safetensors do not exist; check the path"
    assert not [n for n in runs.RECORDS if (tmp_path/"out"/n).exists()] and "Traceback" in (tmp_path/"out/error.log").read_text()


def test_a_notebook_without_a_record_gets_one(tmp_path, notebook):
    assert dr2seg(tmp_path, "run", notebook("1 + 1"), "--out", "out").returncode == 0
    record = runs.read_json(tmp_path/"out/run.json")
    assert record["status"] == "done" and record["parameters"]["steps"] == 3


def test_a_config_refused_in_the_notebook_is_a_sentence(tmp_path):
    class Error(Exception): ename, exec_count, traceback = "ValidationError", 2, ["..."]
    Error.evalue = str(pytest.raises(pydantic.ValidationError, Config, recipe="x").value)
    assert cli.explain(Error(), tmp_path) == ('recipe unknown recipe "x"; known are dr2seg, dpad', 2)


def test_a_killed_kernel(tmp_path, notebook):
    "Papermill would call these cells completed."
    failed = dr2seg(tmp_path, "run", notebook(TRAIN.replace("break", "pass").replace(
        "run.log(", "step > 1 and __import__('os').kill(__import__('os').getpid(), 9)\n        run.log(")), "--out", "out")
    assert failed.returncode == 1 and "dr2seg: the kernel was killed" in failed.stderr
    assert runs.read_json(tmp_path/"out/run.json")["status"] == "failed"
    assert runs.Run.open(tmp_path/"out").metrics() == [{"step": 1}]


def test_ctrl_c_then_resume(tmp_path, notebook):
    path = notebook(TRAIN)
    process = start(tmp_path, "run", path, "-p", "steps", "30", "-p", "nap", "0.2", "--out", "out")
    assert dr2seg(tmp_path, "run", path, "--out", "out").returncode == 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and f"go on with: dr2seg run {path} --resume --out out" in err
    run = runs.Run.open(tmp_path/"out")
    done = len(run.metrics())
    assert run.status == "interrupted" and 1 <= done < 30 and not (run.folder/"stop").exists()

    other = dr2seg(tmp_path, "run", path, "--resume", "--out", "out", "-p", "steps", "4")
    assert other.returncode == 2 and "was started with steps = 30, not 4" in other.stderr
    runs.update(run.folder, parameters=run.info["parameters"] | {"nap": 0.0})     # to be quick
    resumed = dr2seg(tmp_path, "run", path, "--resume", "--out", "out", "-p", "steps", "30")
    assert resumed.returncode == 0, resumed.stderr
    assert run.status == "done" and [r["step"] for r in run.metrics()] == list(range(1, 31))


def test_a_run_goes_on_in_another_number_of_processes(tmp_path, notebook):
    path = notebook("pass", parameters='steps = 3\nprocesses = 1\nout = ""\nresume = False')
    runs.Run.create(tmp_path/"run", dict(steps=5, processes=4, out="run", resume=False), bar=False).finish("interrupted")
    asked = lambda *given: cli.prepare(cli.parser().parse_args(["run", path, "--resume", "--out", str(tmp_path/"run"), *given]))[2]
    assert asked() == dict(steps=5, processes=4) and asked("-p", "processes", "2") == dict(steps=5, processes=2)
    with pytest.raises(ValueError, match="was started with steps = 5, not 9"): asked("-p", "steps", "9")


def test_a_second_ctrl_c_interrupts_a_deaf_notebook(tmp_path, notebook):
    process = start(tmp_path, "run", notebook("open(out + '/here', 'w').close()\nimport time\ntime.sleep(60)"),
                    "--out", "out", until="here")
    process.send_signal(signal.SIGINT)
    while not (tmp_path/"out/stop").exists(): time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 130 and runs.status(tmp_path/"out") == "interrupted"


def test_check_counts_and_names_what_is_broken(tmp_path, capsys):
    from PIL import Image
    (tmp_path/"images").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path/"images"/"a.png")
    good = dict(id="a", image="images/a.png", query="what is it?", polygon=[[[2, 2], [20, 2], [20, 20]]])
    (tmp_path/"data.jsonl").write_text(json.dumps(good) + "\n")
    assert cli.main(["check", str(tmp_path)]) == 0 and "nothing broken" in capsys.readouterr().out
    (tmp_path/"data.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | dict(id="b", image="../a.png")) + "\n")
    assert cli.main(["check", str(tmp_path)]) == 1 and "1 broken:" in capsys.readouterr().out
    assert cli.main(["check", str(tmp_path/"nothing")]) == 2 and "does not exist" in capsys.readouterr().err


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    "As root nothing is forbidden, so the command gives its rights away first."
    tmp_path.chmod(0o555)
    script = f"""import os, pydantic, dr2seg_lib.training
from dr2seg_lib import cli
if os.geteuid() == 0: os.seteuid(65534)
raise SystemExit(cli.main(["run", "train", "-p", "steps", "1", "--out", {str(tmp_path / "run")!r}]))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "run cannot be written (Permission denied); grant permission" in done.stderr


@pytest.mark.parametrize("args", [("train", "-p", "model"), ("evaluate", "-p", "model"), ("evaluate", "-p", "segmenter"), ("rea2seg", "-p", "model"), ("rea2seg", "-p", "scorer")], ids=" ".join)
def test_a_hub_that_no_network_leads_to_is_one_sentence(args, tmp_path, capsys):
    name = "facebook/sam2.1-hiera-tiny" if args[-1] == "segmenter" else "nobody/nothing"
    assert cli.main(["run", *args, name, "--out", str(tmp_path/"run")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dr2seg:")]
    assert len(said) == 1 and f"{name} cannot be loaded (" in said[0] and "connect to the hub" in said[0]


@pytest.mark.parametrize("experiment", ["train", "evaluate", "rea2seg"])
def test_a_checkpoint_that_lacks_a_shard_is_told_before_anything_starts(experiment, tmp_path, capsys):
    (tmp_path/"model").mkdir()
    for name in "config.json", "tokenizer.json": (tmp_path/"model"/name).write_text("{}")
    (tmp_path/"model"/"model.safetensors.index.json").write_text('{"weight_map": {"w": "model-00001-of-00002.safetensors"}}')
    assert cli.main(["run", experiment, "-p", "model", str(tmp_path/"model"), "--out", str(tmp_path/"run")]) == 2
    assert capsys.readouterr().err == f"dr2seg: model {tmp_path}/model is not whole (model-00001-of-00002.safetensors is missing); fetch it again\n"
    assert not (tmp_path/"run").exists()
