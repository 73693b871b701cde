"The pages of results say what results/*.json keeps; a study that is kept is one that was asked."

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", KEPT, ids=lambda p: p.stem)
def test_a_kept_study_is_one_of_those_asked(make, path):
    kept = json.loads(path.read_text())
    assert kept["command"] == shlex.join(make.words_of(path.stem))
    assert kept["tables"]
    assert kept["processor"]
    assert kept["versions"]["torch"]
    for picture in make.STUDIES[path.stem].get("plots", {}):
        assert (ROOT / "docs" / picture).exists()
