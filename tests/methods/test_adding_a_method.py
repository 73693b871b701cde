"The method of docs/adding_a_method.md: everything learns of it from its file alone."

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dr2seg_lib.core.files import write_json
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.samples import Target
from dr2seg_lib.evaluation.config import EvaluateConfig
from dr2seg_lib.evaluation.evaluate import predict_batch, run_evaluation
from dr2seg_lib.methods.names import (
    MethodLabel,
    labels_in,
    library_labels,
    method_colour,
    method_names,
    method_title,
)
from dr2seg_lib.methods.registry import METHODS, load_method, register_method
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.rollouts.combination import combined_reward, recorded_combination
from dr2seg_lib.rollouts.parsing import Parsed
from dr2seg_lib.segmenters.loading import load_segmenter
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import train
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.paper_tables import side_by_side
from dr2seg_lib.viewing.report import write_report
from dr2seg_lib.viewing.style import arm_colours
from dr2seg_lib.viewing.word_attention import asked_prompt

PAGE = Path(__file__).parents[2] / "docs/adding_a_method.md"
CODE = re.search(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)[1]
TINY = dict(
    steps=2,
    prompts=2,
    samples=3,
    rank=4,
    alpha=4,
    eval_samples=2,
    max_new_tokens=100,
    segmenter="grabcut",
)


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "my_method.py"
    file.write_text(CODE)
    yield f"{file}:terse"
    METHODS.pop(f"{file}:terse", None)


@pytest.fixture(scope="module")
def run(name, tmp_path_factory):
    return train(TrainConfig(**TINY, method=name), tmp_path_factory.mktemp("runs") / "terse-1")


def test_training_pays_by_it(run):
    row = run.metrics()[-1]
    assert row["step"] == 2
    assert "brevity" in row["terms"]
    assert row["tokens_second"] is None


def test_its_rollouts_say_how_the_reward_is_made(run):
    rows = run.rollouts()
    combination = recorded_combination(rows)
    assert combination["factors"] == ["brevity"]
    assert "accuracy" in combination["added"]
    for row in rows:
        assert combined_reward(row["terms"], combination) == pytest.approx(row["reward"])


def test_figures_have_its_colour(name, run):
    assert arm_colours(["dr2seg", name])[name] == "#3f8f5f"


def test_tables_have_its_title(run):
    tables = side_by_side([run.folder])
    rows = [row[0] for table, _ in tables.values() for row in table.rows]
    assert "ours: terse-1, Terse, after training" in [re.sub(r"\S*/", "", row) for row in rows]


def test_the_report_shows_its_factor(run):
    html = write_report(run.folder).read_text("utf-8")
    assert "× brevity" in re.sub(r"<[^>]+>|\s+", " ", html).replace("  ", " ")
    assert "#3f8f5f" in html


def test_the_inspector_shows_its_factor_and_prompt(run):
    view = inspect(run.folder)
    assert view.about["factor"] == "brevity"
    row = view.run.groups["rollouts"][0][0]
    assert asked_prompt(view.run, row, "first").startswith("Please find")


def test_a_method_may_read_answers_in_its_own_way():
    def parse(text):
        return Parsed(description="mine", objects=[Target((0, 0, 56, 56), (28, 28))])

    samples, prompt = MiniReasonSeg("val", 1), METHODS["dr2seg"].prompt
    asked = Policy.load(), load_segmenter("grabcut"), samples, prompt, [0]
    (row,) = predict_batch(*asked, max_new_tokens=4, parse=parse)
    assert row["format"] == 1
    assert row["parsed"]["description"] == "mine"
    assert row["parsed"]["objects"] == [dict(box=[0, 0, 56, 56], point=[28, 28])]


# names


def test_every_name_of_the_registry_is_known_without_it():
    assert list(METHODS) == method_names()


@pytest.mark.parametrize("module", library_labels())
def test_a_label_is_that_of_its_method(module):
    for name, label in library_labels()[module].items():
        method = METHODS[name]
        assert (label.title, label.colour, label.ablation) == (
            method.title,
            method.colour,
            method.ablation,
        )


def test_a_file_is_read_and_not_run():
    assert labels_in("raise SystemExit\n" + CODE) == dict(terse=MethodLabel("Terse", "#3f8f5f"))


def test_titles_and_colours_of_the_library_differ():
    labels = [label for of_file in library_labels().values() for label in of_file.values()]
    titles = [label.title for label in labels]
    assert len(set(titles)) == len(titles)
    colours = [label.colour for label in labels if label.colour]
    assert len(set(colours)) == len(colours)


# another process, which never ran its file


@pytest.fixture
def elsewhere(name, monkeypatch):
    monkeypatch.delitem(METHODS, name)
    monkeypatch.setattr("dr2seg_lib.methods.names.RECORDED", {})


def test_its_title_is_read_from_the_run(name, run, elsewhere):
    assert method_title(name) == name
    side_by_side([run.folder])
    assert method_title(name) == "Terse"


def test_its_colour_is_read_from_the_run(name, run, elsewhere):
    assert method_colour(name) is None
    inspect(run.folder)
    assert method_colour(name) == "#3f8f5f"


def test_its_colour_is_read_by_the_report(name, run, elsewhere):
    write_report(run.folder)
    assert arm_colours([name]) == {name: "#3f8f5f"}


def test_its_title_is_read_from_an_evaluation(name, tmp_path, elsewhere):
    config = EvaluateConfig(method=name, samples=2, segmenter="grabcut", max_new_tokens=20)
    try:
        evaluated = run_evaluation(config, tmp_path / "evaluated")
    finally:
        METHODS.pop(name, None)
    assert "Terse" in side_by_side([evaluated.folder])["Other data"][0].markdown


def test_a_colour_that_is_none_is_left_out(name, tmp_path, elsewhere):
    label = dict(title="<b>Terse</b>", colour="red; background: url(x)")
    write_json(tmp_path / "run.json", dict(parameters=dict(method=name), method_label=label))
    inspect(tmp_path)
    assert method_colour(name) is None


# combination


def test_a_term_that_is_not_there_is_named(name):
    method = replace(load_method(name), factors=("length",))
    with pytest.raises(ValueError, match="method terse: .* name length; let both agree"):
        method.combination(["accuracy"])


def test_a_term_may_be_recorded_and_not_paid(name):
    method = replace(load_method(name), factors=(), added=("accuracy",))
    assert method.combination(["accuracy", "brevity"]) == dict(added=["accuracy"], factors=[])


def test_a_method_may_have_another_name(name):
    method = load_method(name)
    try:
        assert register_method(method, "brief") is METHODS["brief"]
    finally:
        del METHODS["brief"]


@pytest.mark.parametrize("name", method_names())
def test_terms_and_reward_of_every_method_agree(name):
    "The combination against sums and products by hand."
    method, terms = METHODS[name], dict(a=torch.tensor([1.0, 2.0]), b=torch.tensor([3.0, 4.0]))
    terms |= {factor: torch.tensor([0.5, 0.25]) for factor in method.factors}
    made = replace(method, terms=lambda method, group, frame: terms)
    total = [4.0, 6.0] if not method.factors else [2.0, 1.5]
    assert made.reward(None, 112)[1].tolist() == total
