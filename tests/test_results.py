"The pages of results say what results/*.json keeps; a study that is kept is one that was asked."

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from dr2seg_lib.core.files import write_jsonl
from dr2seg_lib.experiments.sweeps import arm_results, unfinished_runs
from dr2seg_lib.runs.run_folder import Run

ROOT = Path(__file__).parents[1]
KEPT = sorted(p for p in (ROOT / "results").glob("*.json") if p.name != "studies.json")


@pytest.fixture(scope="module")
def make():
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "results" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pages_hold_the_kept_tables(make):
    for page in make.PAGES:
        text = page.read_text()
        assert make.written(text) == text, f"{page.name}: run python results/make.py write"
        assert text.count("<!-- table ") == text.count("<!-- end -->")
    blocks = [b[1] for page in make.PAGES for b in make.BLOCK.findall(page.read_text())]
    assert {p.stem for p in KEPT} == set(blocks), "a study is kept that no page shows"


def test_an_altered_figure_is_found(make):
    page = next(p for p in make.PAGES if make.BLOCK.search(p.read_text()))
    text = page.read_text()
    block = make.BLOCK.search(text)
    altered = text[: block.end(1)] + "| 99.9 |" + text[block.end() - len(block[4]) :]
    assert make.written(altered) == text


def test_an_empty_block_is_filled_and_the_next_left_alone(make, monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text('{"tables": {"one": "| 1 |", "two": "| 2 |"}}')
    monkeypatch.setattr(make, "HERE", tmp_path)
    empty = "<!-- table a one -->\n<!-- end -->\nprose\n<!-- table a two -->\n<!-- end -->\n"
    filled = empty.replace("one -->", "one -->\n| 1 |").replace("two -->", "two -->\n| 2 |")
    assert make.written(empty) == make.written(filled) == filled


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.stem)
def test_a_kept_study_is_one_of_those_asked(make, path):
    kept = json.loads(path.read_text())
    assert kept["command"] == shlex.join(make.words_of(path.stem))
    assert kept["tables"]
    assert kept["processor"]
    assert kept["versions"]["torch"]
    for picture in make.STUDIES[path.stem].get("plots", {}):
        assert (ROOT / "docs" / picture).exists()


def test_records_go_on_elsewhere(make, tmp_path, monkeypatch):
    "A study half done is packed here, unpacked there, and only what is missing is left to do."
    monkeypatch.setattr(make, "RUNS", tmp_path / "here")
    monkeypatch.setattr(make, "PACKED", tmp_path / "packed")
    folders = {name: tmp_path / "here" / "study" / name for name in ("done", "half")}
    with Run.create(tmp_path / "here" / "study", dict(methods=["dr2seg"])):
        pass
    for name, folder in folders.items():
        with Run.create(folder, dict(method="dr2seg")) as run:
            run.log(dict(step=1))
            run.results(dict(after=dict(gIoU=0.5)))
            write_jsonl(folder / "predictions_after.jsonl", [dict(sample="a", iou=0.5)])
            (folder / "rollouts.jsonl").write_text("not packed")
            run.stopped = name == "half"
    make.pack("study")
    with pytest.raises(SystemExit, match="exists; delete it, or go on with it"):
        make.unpack("study")
    monkeypatch.setattr(make, "RUNS", tmp_path / "there")
    make.unpack("study")
    folders = {name: tmp_path / "there" / "study" / name for name in folders}
    assert list(unfinished_runs(folders)[0]) == ["half"]
    assert Run.open(folders["done"]).metrics() == [dict(step=1)]
    assert not (folders["done"] / "rollouts.jsonl").exists()
    assert arm_results(tmp_path / "there" / "study", dict(dr2seg=["done", "half"])) == {
        "dr2seg": [dict(after=dict(gIoU=0.5))]
    }


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "records").glob("*.tar.xz")), ids=str)
def test_packed_runs_are_of_the_study(make, path, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "RUNS", tmp_path)
    study = path.name.removesuffix(".tar.xz")
    make.unpack(study)
    arms, asked = make.sweep_runs(tmp_path / study), make.STUDIES[study]["parameters"]["config"]
    results = arm_results(tmp_path / study, arms)
    assert any(results.values())
    assert all(r["after"]["n"] == asked["evaluation"]["samples"] for r in sum(results.values(), []))
    for run in (path.parent for path in (tmp_path / study).glob("*/run.json")):
        assert run.name in sum(arms.values(), [])
        assert Run.open(run).metrics()[-1]["step"] == asked["steps"]
