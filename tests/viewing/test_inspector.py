"The inspector: what a folder holds, how fast it is shown, and a real JupyterLab in a real browser."

import gc
import json
import shutil
import time

import browser
import numpy as np
import plotly.graph_objects as go
import pytest
from browser import chromium
from invented_runs import BAD, Reader, make_run, metrics

from dr2seg_lib.core.files import read_json, read_jsonl, write_json, write_jsonl
from dr2seg_lib.core.masks import encode_rle
from dr2seg_lib.data.samples import Sample, Target
from dr2seg_lib.rollouts.combination import factor_of
from dr2seg_lib.runs.checkpoints import save_checkpoint
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.status import run_status, update_record
from dr2seg_lib.training.batches import sample_batch
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.viewing.compare import (
    compare,
    final_predictions,
    measure_differences,
    won_and_lost,
)
from dr2seg_lib.viewing.group_view import rollout_entry
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.live import Live, live, live_charts
from dr2seg_lib.viewing.playground import (
    Playground,
    target_from_click,
)
from dr2seg_lib.viewing.playground_inputs import askable_sample, cached_policy
from dr2seg_lib.viewing.reward_terms import term_colours
from dr2seg_lib.viewing.rollout_columns import field_columns
from dr2seg_lib.viewing.run_groups import group_rollouts
from dr2seg_lib.viewing.run_reader import RunReader
from dr2seg_lib.viewing.run_samples import sample_by_id
from dr2seg_lib.viewing.screen import (
    fit_picture,
    mask_from_runs,
    prompt_shapes,
    row_run_lengths,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "dr2seg-1", steps=12, samples=16)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return make_run(
        tmp_path_factory.mktemp("runs") / "vr-1",
        steps=12,
        samples=16,
        recipe="visionreasoner",
        seed=1,
        end=70.0,
    )


def copied(folder, to):
    for p in folder.iterdir():
        if p.is_file():
            (to / p.name).write_bytes(p.read_bytes())
    return to


# ---- data


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 48)])
def test_run_lengths_and_back(shape):
    rng = np.random.default_rng(shape[0])
    for mask in (rng.random(shape) < 0.5, np.zeros(shape, bool), np.ones(shape, bool)):
        lengths = row_run_lengths(mask)
        assert (mask_from_runs(lengths, shape[::-1]) == mask).all()
        assert all(n > 0 for n in lengths[1:])
        assert json.loads(json.dumps(lengths)) == lengths


def test_large_pictures_shrink_with_everything_on_them():
    image, mask = np.zeros((600, 2400, 3), np.uint8), np.zeros((600, 2400), bool)
    mask[300:, 1200:] = True
    small = fit_picture(mask)
    assert fit_picture(image).shape == (256, 1024, 3)
    assert small.dtype == bool
    assert small[128:, 512:].all()
    assert small.sum() == 128 * 512
    assert prompt_shapes([Target((1200, 300, 2399, 599), (1800, 450))], (2400, 600), (1024, 256))[
        0
    ]["box"][:2] == [512.0, 128.0]


def test_terms_make_the_reward(whole, other):
    "The bars add up: what the view shows as paid is the reward that was recorded."
    for folder in whole, other:
        it = RunReader(folder)
        assert it.factor == "length"
        for row in (r for g in it.groups["rollouts"] for r in g):
            paid = sum(v * row["terms"]["length"] for k, v in row["terms"].items() if k != "length")
            assert paid == pytest.approx(row["reward"])
    terms = dict(seg=3.0, used=0.5)

    def recorded(*added, factors=()):
        return [dict(terms=terms, combination=dict(added=[*added], factors=[*factors]))]

    assert factor_of(recorded("seg", "used")) == ""
    assert factor_of(recorded("seg", factors=["used"])) == "used"
    assert factor_of(recorded("seg")) is None, "a term that is not paid"
    assert factor_of(recorded(factors=["seg", "used"])) is None, "two factors"
    assert factor_of([dict(terms=dict(a=1.0, b=-0.5))]) == "", "before, all was added"


def test_colours_of_unknown_terms_differ():
    colours = term_colours(["accuracy", "x", "y", "z"])
    assert len(set(colours.values())) == 4


def test_groups_and_fields(whole):
    it = RunReader(whole)
    index = field_columns(it.groups["rollouts"])
    assert {len(v) for v in index.values()} == {sum(map(len, it.groups["rollouts"]))}
    assert {
        "reward",
        "advantage",
        "tokens",
        "tokens_second",
        "entropy",
        "accuracy",
        "length",
        "difficulty",
        "kind",
    } <= set(index)
    evaluation = field_columns(it.groups["evaluation"])
    change = [after["iou"] - before["iou"] for before, after in it.groups["evaluation"]]
    assert evaluation["change"][::2] == pytest.approx(change, abs=1e-6)
    assert set(evaluation["when"]) == {"before", "after"}
    assert "iou" in evaluation
    assert "step" not in evaluation


def test_frame_of_the_policy(whole, tmp_path):
    assert RunReader(whole).frame == 112
    copied(whole, tmp_path)
    update_record(
        tmp_path,
        parameters=read_json(tmp_path / "run.json")["parameters"]
        | dict(model="Qwen/Qwen2.5-VL-7B-Instruct"),
    )
    assert RunReader(tmp_path).frame == 840
    update_record(tmp_path, frame=448)
    assert RunReader(tmp_path).frame == 448


def test_what_a_model_says_is_escaped(tmp_path):
    said = dict(text=BAD, tokens=[BAD, BAD], entropy=[0.1, 9.0], think_tokens=2)
    whole = f"<think>{BAD}</think><description>{BAD}</description><answer>{BAD}</answer>"
    for row in (
        dict(rollout=0, first=said, second=said, terms={BAD: 1.0}, reward=1.0, advantage=0.0),
        dict(text=whole, when="after", tokens=3, iou=0.0),
    ):
        shown = rollout_entry(dict(sample=BAD, query=BAD) | row, 0)
        for html in (shown[k] for k in ("first", "second", "description") if k in shown):
            page = Reader(html)
            assert not page.open
            assert not {"script", "img"} & set(page.tags)


# ---- folders that are not whole


def test_a_missing_file_is_said(whole, tmp_path):
    copied(whole, tmp_path)
    (tmp_path / "rollouts.jsonl").unlink()
    widget = inspect(tmp_path)
    assert widget.about["missing"] == "Not shown: rollouts.jsonl is not there."
    assert widget.source == "evaluation"
    assert widget.shown["entries"]
    (tmp_path / "run.json").unlink()
    assert (
        "run.json is not there; rollouts.jsonl is not there" in inspect(tmp_path).about["missing"]
    )


def test_a_cut_file_is_said(whole, tmp_path):
    copied(whole, tmp_path)
    text = (tmp_path / "rollouts.jsonl").read_bytes()
    kept = text[: len(text) // 2]
    (tmp_path / "rollouts.jsonl").write_bytes(kept)
    (tmp_path / "run.json").write_text('{"status": "do')
    widget = inspect(tmp_path)
    line = kept.count(b"\n") + 1
    assert (
        widget.about["missing"]
        == f"Not shown: run.json is not valid JSON; rollouts.jsonl, line {line} is cut short."
    )
    assert widget.shown["entries"][0]["prompts"]


def test_nothing_and_nowhere(tmp_path):
    widget = inspect(tmp_path)
    assert widget.shown == {}
    assert widget._repr_mimebundle_()[0]["image/png"].startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; check"):
        inspect(tmp_path / "nowhere")


def test_a_picture_that_cannot_be_had(whole, tmp_path):
    copied(whole, tmp_path)
    write_jsonl(
        tmp_path / "rollouts.jsonl",
        [r | dict(sample="photo-7") for r in read_jsonl(whole / "rollouts.jsonl")],
    )
    update_record(
        tmp_path,
        parameters=read_json(tmp_path / "run.json")["parameters"]
        | dict(data=str(tmp_path / "gone")),
    )
    widget = inspect(tmp_path)
    assert widget.shown["image"] is None
    assert "the picture of photo-7 cannot be had" in widget.shown["note"]
    assert len(widget.shown["entries"]) == 8
    assert widget.still()._repr_mimebundle_()[0]["image/png"]
    assert "no mask" in widget.answer("rollouts", 0, 0)["note"]


def test_samples_of_other_data_are_found_by_their_place(whole, tmp_path, monkeypatch):
    data = [Sample(f"photo-{i}", np.full((30, 40, 3), i, np.uint8), "?", ()) for i in range(50)]
    monkeypatch.setattr(
        "dr2seg_lib.viewing.run_reader.load_data", lambda name, split, limit=None: data
    )
    copied(whole, tmp_path)
    config = TrainConfig(**read_json(tmp_path / "run.json")["parameters"])
    rows = read_jsonl(whole / "rollouts.jsonl")
    place = {}
    for r in rows:
        place.setdefault(r["step"], []).append(r["sample"])
    named = {
        (s, name): sample_batch(data, config, s)[0][i].id
        for s, names in place.items()
        for i, name in enumerate(dict.fromkeys(names))
    }
    write_jsonl(
        tmp_path / "rollouts.jsonl", [r | dict(sample=named[r["step"], r["sample"]]) for r in rows]
    )
    it = RunReader(tmp_path)
    for at, group in enumerate(it.groups["rollouts"]):
        assert it.sample("rollouts", at).id == it.named(group[0]["sample"]).id == group[0]["sample"]


# ---- the widget, in time


@pytest.fixture(scope="module")
def thousand(whole, tmp_path_factory):
    "A run of 1,000 rollouts."
    folder = copied(whole, tmp_path_factory.mktemp("thousand"))
    group = group_rollouts(read_jsonl(whole / "rollouts.jsonl"))[0]
    write_jsonl(
        folder / "rollouts.jsonl",
        [
            r | dict(step=1 + g // 2, sample=f"mini-{1_000_000 + g}")
            for g in range(125)
            for r in group
        ],
    )
    return folder


@pytest.fixture
def others_set_aside():
    "What other tests have left in the memory is not looked through for garbage meanwhile."
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_a_thousand_rollouts_open_in_two_seconds(thousand, others_set_aside):
    began = time.process_time()
    widget = inspect(thousand)
    opened = time.process_time() - began
    assert len(widget.index["rollouts"]["group"]) == 1000, f"{opened:.2f} s"
    assert opened < 2, f"{opened:.2f} s"
    times = []
    for at in range(1, 30):
        began = time.process_time()
        widget.at = at
        times.append(time.process_time() - began)
    assert widget.shown["at"] == 29, f"{max(times):.3f} s"
    assert max(times) < 0.2, f"{max(times):.3f} s"


def test_traits_and_messages(whole):
    widget, sent = inspect(whole), []
    widget.send = lambda content, buffers=None: sent.append(content)
    widget._asked(widget, dict(ask="mask", source="rollouts", at=1, rollout=2), [])
    assert sent[0]["mask"] == "rollouts/1/2"
    assert sum(sent[0]["runs"]) == 224 * 224
    assert 0 <= sent[0]["iou"] <= 1
    assert ("rollouts", 1, 2) in widget.run.masks
    widget.rollout = 6
    widget.source = "evaluation"
    assert widget.at == widget.rollout == 0
    assert [e["name"] for e in widget.shown["entries"]] == [
        "before",
        "after",
    ]
    stored = widget.run.groups["evaluation"][0][0]
    assert widget.answer("evaluation", 0, 0)["iou"] == pytest.approx(stored["iou"])
    assert encode_rle(widget.run.masks["evaluation", 0, 0]) == stored["rle"]
    widget.at = 10**6
    assert widget.shown["at"] == 15
    json.dumps(
        {k: v for k, v in widget.get_state().items() if k in ("about", "index", "shown")},
        allow_nan=False,
    )


def test_every_view_has_a_picture_for_where_no_widget_lives(whole, other):
    for widget in inspect(whole), Live(whole), compare([whole, other]):
        data, _ = widget._repr_mimebundle_()
        assert data["image/png"].startswith(b"\x89PNG")
        assert "application/vnd.jupyter.widget-view+json" in data


def test_plain_html_shows_the_picture(whole):
    "A page made of a notebook that keeps no widgets has the still in their place."
    import base64

    import nbformat
    from nbconvert import HTMLExporter

    data, meta = inspect(whole)._repr_mimebundle_()
    output = nbformat.v4.new_output(
        "display_data",
        data | {"image/png": base64.b64encode(data["image/png"]).decode()},
        metadata=meta,
    )
    page, _ = HTMLExporter().from_notebook_node(
        nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell("inspect(run)", outputs=[output])]
        )
    )
    assert "data:image/png;base64," in page


# ---- where the model looks


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    "A run whose records were said by the embedded policy, with one checkpoint, of step 4."
    from dr2seg_lib.methods.dr2seg import dr2seg
    from dr2seg_lib.rollouts.two_stage import generate_rollouts

    folder, policy = tmp_path_factory.mktemp("spoken") / "run", cached_policy("embedded")
    with Run.create(
        folder,
        dict(
            recipe="dr2seg",
            model="embedded",
            segmenter="embedded",
            data="mini",
            seed=0,
            steps=5,
            prompts=1,
            samples=2,
        ),
        bar=False,
    ) as run:
        for step in (1, 5):
            group = generate_rollouts(
                policy,
                [sample_by_id(f"mini-{1_000_000 + step}")],
                dr2seg.prompt,
                dr2seg.second_prompt,
                2,
                192,
                seed=step,
            ).groups[0]
            run.record(
                [
                    dict(
                        step=step,
                        sample=group.sample.id,
                        query=group.sample.query,
                        tags=group.sample.tags,
                        rollout=k,
                        first=a.record(),
                        second=b and b.record(),
                        description=a.parsed.description,
                        terms=dict(accuracy=1.0),
                        reward=1.0,
                        advantage=0.0,
                    )
                    for k, (a, b) in enumerate(zip(group.first, group.second))
                ]
            )
        policy.add_lora(4, 4)
        save_checkpoint(folder, 4, lambda f: policy.adapter.save_pretrained(str(f)))
    return folder


def test_attention_of_every_word_of_a_pass(spoken):
    "One forward gives the grid of each token, by the weights nearest to the record's step."
    view = inspect(spoken)
    row = view.run.groups["rollouts"][0][0]
    told, grids = view.look("rollouts", 0, 0, "first")
    T = len(row["first"]["tokens"])
    assert told["note"] == ""
    assert told["by"] == "the start's weights"
    assert told["size"] == (7, 7)
    assert len(told["share"]) == len(told["peak"]) == T
    assert len(grids) == T * 49
    shown = np.frombuffer(grids, np.uint8).reshape(T, 49)
    assert (shown[1:].max(1) == 255).all()
    assert not shown[0].any()
    assert max(told["peak"]) == 1
    assert all(0 < s < 1 for s in told["share"][1:])
    said = [
        t for t, token in enumerate(row["first"]["tokens"]) if token.strip().isdigit()
    ]  # coordinates are read off the picture
    assert np.mean([told["share"][t] for t in said]) > np.mean(told["share"])
    began = time.process_time()
    assert view.look("rollouts", 0, 0, "first")[1] == grids
    assert time.process_time() - began < 0.05
    assert view.look("rollouts", 1, 1, "first")[0]["by"] == "step 4's weights"
    json.dumps(told, allow_nan=False)


def test_attention_comes_within_two_seconds(spoken):
    view = inspect(spoken)
    view.look("rollouts", 0, 0, "first")
    began = time.process_time()
    assert view.look("rollouts", 0, 1, "first")[0]["note"] == ""
    assert time.process_time() - began < 2


def test_attention_that_cannot_be_had_is_said(spoken, tmp_path):
    "A large model is not loaded by a glance, an unknown method not asked; a given policy is used."
    copied(spoken, tmp_path)
    parameters = read_json(spoken / "run.json")["parameters"]
    for change, why in (
        (dict(model="Qwen/Qwen2.5-VL-7B-Instruct"), "is not loaded for a glance; give it"),
        (dict(recipe="mine"), "the method mine is not known here; register it"),
    ):
        update_record(tmp_path, parameters=parameters | change)
        told, grids = inspect(tmp_path).look("rollouts", 0, 0, "first")
        assert why in told["note"]
        assert not grids
    update_record(tmp_path, parameters=parameters | dict(model="Qwen/Qwen2.5-VL-7B-Instruct"))
    assert inspect(tmp_path, policy="embedded").look("rollouts", 0, 0, "first")[0]["note"] == ""


def test_the_thread_that_looks_sends_what_it_saw(spoken):
    view, sent = inspect(spoken), []
    view.send = lambda content, buffers=None: sent.append((content, buffers))
    view._asked(
        view, dict(ask="look", source="rollouts", at=0, rollout=0, **{"pass": "second"}), []
    )
    for _ in range(600):
        if sent:
            break
        time.sleep(0.1)
    assert sent[0][0]["look"] == "rollouts/0/0/second"
    assert len(sent[0][1][0]) == 49 * len(sent[0][0]["share"])


# ---- live


def test_live_follows_and_stops(tmp_path):
    rng = np.random.default_rng(0)
    view = Live(tmp_path / "later", every=0.05)
    assert view.state["status"] == "waiting"
    assert view.thread.is_alive()
    with Run.create(tmp_path / "later", dict(method="dr2seg", steps=9, seed=3), bar=False) as run:
        for step in range(1, 10):
            run.log(metrics(rng, step))
            run.progress("training", step, 9)
            if step == 4:
                view.stop()
            if step > 4 and run.stop_requested():
                break
            time.sleep(0.1)
    view.thread.join(5)
    assert step == 5
    assert view.state["status"] == "interrupted"
    assert not view.thread.is_alive()
    curves = view.charts()["curves"]
    assert curves.panels[0].marks[-1].x.tolist() == [1, 2, 3, 4, 5]
    titles = [panel.title for panel in curves.panels]
    assert set(titles) >= {"reasoning tokens", "KL to the reference", "accuracy reward"}
    assert not any("total" in bars.name for bars in view.charts()["seconds"].panels[0].marks)


def ask_for_figures(view):
    "What the drawing side sends when a browser shows a view."
    view._handle_custom_msg(dict(ask="figures"), [])


def test_live_grows_a_figure_widget(tmp_path):
    "Before a browser asks there is none; then its traces grow, and a term that comes later too."
    rng, run = np.random.default_rng(0), None
    run = Run.create(tmp_path / "run", dict(method="dr2seg", steps=9, seed=0), bar=False)
    run.log(metrics(rng, 1))
    view = Live(run, every=60)
    assert view.figures == {}
    ask_for_figures(view)
    widget = view.figures["curves"]
    assert isinstance(widget, go.FigureWidget)
    before = len(widget.data)
    row = metrics(rng, 2)
    run.log(row)
    view.look()
    assert view.figures["curves"] is widget
    assert len(widget.data) == before
    assert widget.data[-1].x == (1, 2)
    run.log(row | dict(step=3, terms=row["terms"] | dict(late=1.0)))
    view.look()
    assert len(widget.data) > before
    assert widget._config["typesetMath"] is False
    view.close()
    run.finish("done")


def test_a_comparison_has_figure_widgets(whole, other):
    view = compare([whole, other])
    assert view.figures == {}
    ask_for_figures(view)
    assert set(view.figures) == {"training", "tokens"}
    drawn = view.figures["training"].data
    assert [t.name for t in drawn if t.showlegend] == ["dr2seg", "visionreasoner"]
    view.close()


def test_curves_of_a_long_run_are_thinned():
    rng = np.random.default_rng(0)
    rows = [metrics(rng, s) for s in range(1, 5001)]
    began = time.process_time()
    chart = live_charts(rows)["curves"]
    assert time.process_time() - began < 2
    tokens = next(panel for panel in chart.panels if panel.title == "reasoning tokens")
    raw = tokens.marks[0]
    assert len(raw.x) == 400
    assert raw.x[-1] == 5000
    assert np.mean(raw.y) == pytest.approx(np.mean([r["tokens"] for r in rows]), rel=1e-2)
    assert len(chart.plotly().to_json()) < 600_000


def test_a_finished_run_needs_no_thread(whole):
    view = live(whole)
    assert view.state["status"] == "done"
    assert not hasattr(view, "thread")
    view.stop()
    assert not (whole / "stop").exists()


# ---- compare


def test_comparison(whole, other):
    view = compare([whole, other])
    page = Reader(view.html)
    assert not page.open
    assert "dr2seg against visionreasoner" in view.html
    assert view.html.count('class="d2-chart"') == 2
    a, b = (final_predictions(RunReader(f)) for f in (whole, other))
    won, lost = won_and_lost(a, b)
    assert len(won) + len(lost) == sum((x["iou"] >= 0.5) != (y["iou"] >= 0.5) for x, y in zip(a, b))
    assert view.html.count("<article") == min(len(won), 3) + min(len(lost), 3)
    tokens = measure_differences(dict(a=a, b=b)).rows[0]
    assert float(tokens[3].split(" ±")[0].replace("−", "-")) == pytest.approx(
        float(tokens[2]) - float(tokens[1]), abs=0.11
    )


def test_seeds_make_a_band(whole, other, tmp_path):
    second = make_run(tmp_path / "dr2seg-2", steps=12, samples=16, seed=5)
    view = compare([whole, second, other])
    assert {arm: len(v) for arm, v in view.arms.items()} == dict(dr2seg=2, visionreasoner=1)
    assert "the band their range" in view.html
    assert set(compare(dict(one=[whole], two=[second])).arms) == {"one", "two"}
    assert list(compare([whole, second]).arms) == ["dr2seg-1", "dr2seg-2"]
    with pytest.raises(ValueError, match="two runs or more"):
        compare([whole])


def test_comparison_of_runs_that_are_not_whole(whole, tmp_path):
    (tmp_path / "empty").mkdir()
    view = compare([whole, tmp_path / "empty"])
    assert "empty: Not shown: run.json is not there" in view.html
    assert "Fewer than two" in view.html
    assert not Reader(view.html).open


def test_comparison_of_runs_with_nothing_in_common(whole, other, tmp_path):
    "There is nothing to pair, and no empty plot: a sentence says so."
    copied(other, tmp_path)
    rows = read_jsonl(other / "predictions_after.jsonl")
    elsewhere = [r | dict(sample=f"mini-{3_000_000 + i}") for i, r in enumerate(rows)]
    write_jsonl(tmp_path / "predictions_after.jsonl", elsewhere)
    view = compare([whole, tmp_path])
    assert "No sample in common with dr2seg: visionreasoner." in view.html
    assert view.html.count('class="d2-chart"') == 1
    assert list(view.charts()) == ["training"]
    three = compare(dict(one=whole, two=other, three=tmp_path))
    assert list(three.rows) == ["one", "two"]
    assert "No sample in common with one: three." in three.html


def test_a_folder_that_is_not_there_is_a_sentence_in_a_notebook(tmp_path):
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    shell = InteractiveShell()
    code = "from dr2seg_lib.viewing.inspector import inspect\ninspect('runs/nowhere')"
    with capture_output() as page:
        shell.run_cell(code)
    lines = (page.stdout + page.stderr).strip().splitlines()
    assert len(lines) == 1
    assert "runs/nowhere does not exist; check the run folder's name" in lines[0]


# ---- touch


def test_a_touch_is_a_box_and_a_point():
    assert target_from_click((0, 0, 10, 20), None, (50, 50)).point == (5, 10)
    assert target_from_click(None, (3, 3), (50, 50), last=(0, 0, 9, 9)).box == (0, 0, 9, 9)
    assert target_from_click(None, (1, 49), (50, 50), last=(0, 0, 9, 9)).box == (0, 44, 6, 49)


def test_ask_describe_and_segment_within_two_seconds():
    view = Playground(about=2_000_049)
    times = []
    for _ in range(3):  # CPU seconds, as below: the machine may be busy with something else
        began = time.process_time()
        said = view.ask()
        times.append(time.process_time() - began)
    assert min(times) < 2
    assert view.first["tokens"] == said.think_tokens
    assert view.description == (said.parsed.description or "")
    assert view.drawn["by"] == "first pass"
    sample = view.sample
    for content, by in (
        (dict(ask="segment", box=sample.targets[0].box), "your box"),
        (dict(ask="segment", point=sample.targets[0].point), "your point"),
        (dict(ask="again", **{"pass": "first"}), "first pass"),
    ):
        began = time.process_time()
        view._asked(view, content, [])
        assert time.process_time() - began < 2
        assert view.drawn["by"] == by
        if by == "your box":
            assert view.drawn["iou"] > 0.7
    began = time.process_time()
    view._asked(view, dict(ask="second", description="the yellow moon"), [])
    assert time.process_time() - began < 2
    assert view.second["html"]
    assert view.drawn["by"] == "second pass"
    assert view.busy == ""
    first, errors = view.first, []
    view.send = lambda content, buffers=None: errors.append(content["error"])
    view._asked(view, dict(ask="first", query="  "), [])
    assert errors == ["the question is empty; write what you would ask about this picture"]
    assert view.first == first
    view._asked(view, dict(ask="second", description=" "), [])
    assert view.second == {}
    assert view.busy == ""


def test_two_threads_ask_in_turn():
    "A click and a cell at once have their own answers; a given policy waits for a running cell."
    import threading

    view, said = Playground(about=2_000_049), {}
    threads = [
        threading.Thread(target=lambda q=q: said.update({q: view.ask(q).text}))
        for q in ("what is red here?", "what here is coloured like the deep sea?")
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert len(said) == 2
    assert all(view.ask(q).text == text for q, text in said.items())
    assert view.aside
    assert not Playground(view.policy, about=2_000_049).aside


def test_second_pass_is_that_of_the_rollout():
    "Asking again with the description it gave is the second pass."
    from dr2seg_lib.methods.dr2seg import dr2seg
    from dr2seg_lib.rollouts.two_stage import generate_rollouts

    view = Playground(about=2_000_049)
    said = view.ask()
    group = generate_rollouts(
        view.policy,
        [view.sample],
        lambda q: dr2seg.prompt(q, eval=True),
        dr2seg.second_prompt,
        1,
        256,
        temperature=0,
    ).groups[0]
    assert said.text == group.first[0].text
    assert (view.second["text"] if view.second else None) == (
        group.second[0].text if group.second[0] else None
    )


def test_pictures_to_ask_about(tmp_path):
    import cv2

    cv2.imwrite(
        str(tmp_path / "photo.png"), np.full((20, 30, 3), (255, 0, 0), np.uint8)
    )  # blue, in OpenCV's order
    sample = askable_sample(tmp_path / "photo.png")
    assert sample.size == (30, 20)
    assert sample.image[0, 0].tolist() == [0, 0, 255]
    assert not sample.targets
    (tmp_path / "words.txt").write_text("no picture")
    with pytest.raises(FileNotFoundError, match="words.txt is no picture that can be read"):
        askable_sample(tmp_path / "words.txt")


def test_policy_of_a_run_without_checkpoint(whole):
    with pytest.raises(ValueError, match="has no whole checkpoint yet"):
        cached_policy(whole)


def test_policy_of_a_checkpoint(tmp_path):
    policy = cached_policy("embedded").add_lora(4, 4)
    write_json(tmp_path / "run.json", dict(parameters=dict(model="embedded")))
    path = save_checkpoint(tmp_path, 3, lambda f: policy.adapter.save_pretrained(str(f)))
    for source in tmp_path, path:
        assert cached_policy(source).adapter is not None


# ---- as it is used: JupyterLab in a browser

CELLS = [
    browser.IMPORTS,
    "w = inspect('dr2seg-1')\nw",
    "view = live('later')\nview",
    "a = Playground('embedded', 2_000_049)\na",
    "from dr2seg_lib.training.config import TrainConfig\n"
    "from dr2seg_lib.training.trainer import train\n"
    "train(TrainConfig(steps=300, prompts=2, samples=2, eval_samples=0), 'later').status",
    "w2 = inspect('spoken')\nw2",
    "from dr2seg_lib.core.files import read_jsonl\n"
    "from dr2seg_lib.viewing.curves import training_curves\n"
    "rows = read_jsonl('dr2seg-1/metrics.jsonl')\n"
    "training_curves({'<b>bold</b>': rows, 'other': rows})",
]


@pytest.fixture(scope="module")
def lab(whole, spoken, tmp_path_factory):
    "The page of a notebook whose first four cells have been run."
    if not chromium():
        pytest.skip("no Chromium is found")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(whole, folder / "dr2seg-1")
    shutil.copytree(spoken, folder / "spoken")
    browser.notebook(folder / "views.ipynb", CELLS)
    with browser.jupyterlab(folder) as address, browser.browser() as page:
        page.errors = []
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        browser.opened(page, address, "views.ipynb")
        page.folder = folder
        for _ in range(4):
            browser.command(page, "notebook:run-cell-and-select-next")
        page.wait_for_selector(".d2-ask .d2-main")
        yield page


def magenta(picture):
    return int(((picture[..., 0] > 180) & (picture[..., 1] < 110) & (picture[..., 2] > 150)).sum())


def cyan(picture):
    return int(((picture[..., 0] < 90) & (picture[..., 1] > 150) & (picture[..., 2] > 190)).sum())


@pytest.mark.browser
def test_inspector_in_the_browser(lab):
    "The slider, the keys, the layers, the filter: what is drawn is what was chosen."
    view, canvas = lab.locator(".d2-inspect"), ".d2-inspect canvas"

    def settled(text):
        lab.wait_for_function(
            """([t]) => {
              const view = document.querySelector('.d2-inspect');
              const says = (part, text) => view.querySelector(part).textContent.includes(text);
              return says('.d2-meta', t) && says('.d2-status', 'IoU');
            }""",
            arg=[text],
        )

    settled("step 1")
    lab.wait_for_timeout(300)
    assert view.locator(".d2-card").count() == 8
    assert view.locator("button.d2-row").count() == 8
    for layer, gone, left in ("prediction", magenta, cyan), ("truth", cyan, magenta):
        view.locator(f".d2-{layer}").click()
        lab.wait_for_timeout(150)
        drawn = browser.pixels(lab, canvas)
        assert gone(drawn) < 20
        assert left(drawn) > 100
        view.locator(f".d2-{layer}").click()
    # the bars of a rollout add up to its reward
    for row in range(8):
        bars = view.locator("button.d2-row").nth(row)
        reward, width = (
            float(bars.locator("b").inner_text()),
            bars.evaluate(
                """r => [...r.querySelectorAll('[data-term]')]
                  .reduce((a, e) => a + parseFloat(e.style.width), 0)"""
            ),
        )
        scale = view.evaluate(
            """r => {
              const width = s => [...s.children].reduce((a, e) => a + parseFloat(e.style.width), 0);
              return Math.max(...[...r.querySelectorAll('.d2-stack')].map(width));
            }"""
        )
        if row == 0:
            entries = inspect(lab.folder / "dr2seg-1").shown["entries"]
            top = max(sum(v for k, v in e["terms"].items() if k != "length") for e in entries)
        assert scale == pytest.approx(100, abs=0.1)
        assert width / 100 * top == pytest.approx(reward, abs=0.01)
    # the slider of steps, then the keys
    slider, began = view.get_by_label("step", exact=True), time.perf_counter()
    slider.evaluate(
        "e => { e.value = e.max; e.dispatchEvent(new Event('input', {bubbles: true})) }"
    )
    lab.wait_for_function(
        "() => document.querySelector('.d2-inspect .d2-meta').textContent.includes('step 12')"
    )
    assert time.perf_counter() - began < 5
    settled("step 12")
    view.locator("h4").first.click()
    lab.keyboard.press("ArrowDown")
    lab.wait_for_function(
        """() => document.querySelector('.d2-inspect .d2-slider:nth-of-type(2) output')
          .textContent === '2 of 2'"""
    )
    lab.keyboard.press("3")
    lab.wait_for_function(
        "() => document.querySelector('.d2-inspect .d2-card.d2-on').dataset.rollout === '2'"
    )
    lab.keyboard.press("ArrowLeft")
    settled("step 7")
    # zoom
    before = browser.pixels(lab, canvas)
    view.locator("canvas").focus()
    lab.keyboard.press("+")
    lab.wait_for_timeout(150)
    assert (browser.pixels(lab, canvas) != before).mean() > 0.2
    lab.keyboard.press("0")
    # filter and sort
    view.get_by_label("filter").fill("accuracy>=3")
    lab.wait_for_function(
        "() => document.querySelectorAll('.d2-inspect .d2-card.d2-dim').length > 0"
    )
    view.get_by_label("filter").fill("tokns>3")
    assert 'there is no field "tokns"' in view.locator(".d2-wrong").inner_text()
    view.get_by_label("filter").fill("")
    view.get_by_label("sort by").select_option("reward")
    lab.wait_for_function(
        "() => document.querySelector('.d2-inspect .d2-slider output').textContent.includes(' of ')"
    )
    view.locator("[data-source=evaluation]").click()
    lab.wait_for_function("() => document.querySelectorAll('.d2-inspect .d2-card').length === 2")
    assert not lab.errors


@pytest.mark.browser
def test_order_and_filters_in_the_browser(lab):
    "The first of the order is shown, every example of a filter is understood, counts are true."
    view = lab.locator(".d2-inspect").first
    search = view.get_by_label("filter")
    sort, flip = view.get_by_label("sort by"), view.locator(".d2-flip")
    place, count = view.locator(".d2-slider output").first, view.locator(".d2-count")
    widget = inspect(lab.folder / "dr2seg-1")

    def wait(part, text):
        lab.wait_for_function(
            """([part, text]) => document.querySelector('.d2-inspect ' + part)
              .textContent.includes(text)""",
            arg=[part, text],
        )

    view.locator("[data-source=rollouts]").click()
    wait(".d2-meta", "step")
    sort.select_option("order")
    assert flip.inner_text() == "↑"
    flip.click()  # the newest step first
    assert flip.inner_text() == "↓"
    assert "descending" in flip.get_attribute("title")
    wait(".d2-meta", "step 12")
    assert place.inner_text() == "12 of 12"
    flip.click()
    wait(".d2-meta", "step 1 ")
    assert place.inner_text() == "1 of 12"
    # another field: its first sample, and the hint names the slider that is there
    sort.select_option("reward")
    assert place.inner_text() == "1 of 8"
    hint = view.locator(".d2-keys").inner_text()
    assert "sample" in hint
    assert "step" not in hint
    assert "object" not in hint
    # one rollout is enough, and the view says so
    tokens = widget.index["rollouts"]["tokens"]
    fits = sum(n < 40 for n in tokens)
    search.fill("tokens<40")
    assert f"{fits} of {len(tokens)} rollouts" in count.inner_text()
    assert "one of its rollouts" in view.locator(".d2-any").inner_text()
    # IoU is measured once it is asked for
    search.fill("iou>0.5")
    wait(".d2-count", "rollouts")
    widget.measure()
    fits = sum(iou > 0.5 for iou in widget.index["rollouts"]["iou"])
    lab.wait_for_function(
        """([text]) => document.querySelector('.d2-inspect .d2-count')
          .textContent.includes(text)""",
        arg=[f"{fits} of {len(tokens)} rollouts"],
    )
    search.fill("")
    sort.select_option("order")
    assert not lab.errors


@pytest.mark.browser
def test_filters_of_the_evaluation_in_the_browser(lab):
    "The placeholder's own example is understood, regressions are found, keys are those that work."
    view = lab.locator(".d2-inspect").first
    search, sort = view.get_by_label("filter"), view.get_by_label("sort by")
    columns = inspect(lab.folder / "dr2seg-1").index["evaluation"]
    view.locator("[data-source=evaluation]").click()
    lab.wait_for_function("() => document.querySelectorAll('.d2-inspect .d2-card').length === 2")
    assert "step" not in view.locator(".d2-keys").inner_text()
    search.fill(search.get_attribute("placeholder").removeprefix("filter: "))
    assert view.locator(".d2-wrong").is_hidden()
    search.fill("change<0")
    worse = {g for g, c in zip(*map(columns.get, ("group", "change"))) if c < 0}
    assert view.locator(".d2-count").inner_text().startswith(f"{len(worse)} of 16 samples")
    search.fill("")
    sort.select_option("change")
    lowest = f"{min(columns['change']):.2f}".replace("-", "−")
    lab.wait_for_function(
        "([t]) => document.querySelector('.d2-inspect .d2-key').textContent.includes(t)",
        arg=[lowest],
    )
    sort.select_option("order")
    view.locator("[data-source=rollouts]").click()
    lab.wait_for_function("() => document.querySelectorAll('.d2-inspect .d2-card').length === 8")
    assert not lab.errors


@pytest.mark.browser
def test_fill_on_demand_in_the_browser(lab):
    "Outlines leave the colours alone; a fill comes when it is asked for, with its opacity."
    view, canvas = lab.locator(".d2-inspect").first, ".d2-inspect canvas"
    outlined = magenta(browser.pixels(lab, canvas))
    assert view.locator(".d2-opacity").is_hidden()
    view.locator(".d2-fill").click()
    view.get_by_label("opacity of the masks").fill("100")
    lab.wait_for_timeout(150)
    assert magenta(browser.pixels(lab, canvas)) > 2 * outlined
    view.locator(".d2-fill").click()
    assert view.locator(".d2-opacity").is_hidden()


@pytest.mark.browser
def test_touch_in_the_browser(lab):
    "A question, an edited description, a dragged box, a clicked point."
    view = lab.locator(".d2-ask")
    view.locator(".d2-main").scroll_into_view_if_needed()
    view.locator(".d2-main").click()
    view.locator("[data-pass=second]").wait_for()
    said, description = (
        view.locator(".d2-steps section").nth(2).inner_text(),
        view.get_by_label("description"),
    )
    assert view.locator(".heat i").count() > 5
    assert description.input_value()
    description.fill("the blue star at the top")
    began = time.perf_counter()
    view.get_by_text("Ask again").click()
    lab.wait_for_function(
        """([t]) => {
          const second = document.querySelectorAll('.d2-ask .d2-steps section')[2];
          return second.innerText !== t && second.querySelector('.think, .raw');
        }""",
        arg=[said],
    )
    assert time.perf_counter() - began < 5
    box = view.locator("canvas").bounding_box()
    x1, y1, x2, y2 = sample_by_id("mini-2000049").targets[0].box

    def at(x, y):
        return (
            box["x"] + (x + 0.5) * box["width"] / 224,
            box["y"] + (y + 0.5) * box["height"] / 224,
        )

    began = time.perf_counter()
    lab.mouse.move(*at(x1, y1))
    lab.mouse.down()
    lab.mouse.move(*at(x1 + 3, y1 + 3))
    lab.mouse.move(*at(x2, y2))
    lab.mouse.up()
    lab.wait_for_function(
        "() => document.querySelector('.d2-ask .d2-status').textContent.includes('your box')"
    )
    assert time.perf_counter() - began < 5
    score = float(view.locator(".d2-status").inner_text().split("IoU ")[1].split(" ")[0])
    assert score > 0.7
    assert magenta(browser.pixels(lab, ".d2-ask canvas")) > 100
    lab.mouse.click(*at((x1 + x2) / 2, (y1 + y2) / 2))
    lab.wait_for_function(
        "() => document.querySelector('.d2-ask .d2-status').textContent.includes('your point')"
    )
    assert not lab.errors


@pytest.mark.browser
def test_live_in_the_browser(lab):
    "Training in the next cell: curves grow, a question is answered beside it, the button ends it."
    view = lab.locator(".d2-live")
    assert "no run in this folder yet" in view.inner_text()
    lab.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 4 }")
    browser.command(lab, "notebook:run-cell", wait=False)
    lab.wait_for_function(
        "() => document.querySelectorAll('.d2-live .js-plotly-plot .gtitle, "
        ".d2-live .js-plotly-plot .annotation').length > 8"
    )
    asked = lab.locator(".d2-ask")
    said = asked.locator(".d2-said").first
    said.evaluate("said => said.classList.add('before')")
    asked.locator(".d2-main").click()
    asked.locator(".before").wait_for(state="detached")  # waiting itself may be over in a frame
    asked.locator("[data-pass=first]").wait_for()
    assert view.locator(".d2-pill").inner_text() == "running"
    view.get_by_text("Stop after this step").click()
    lab.wait_for_function(
        "() => document.querySelector('.d2-live .d2-pill').textContent === 'interrupted'"
    )
    steps = read_jsonl(lab.folder / "later/metrics.jsonl")
    assert 0 < len(steps) < 300
    assert run_status(lab.folder / "later") == "interrupted"
    assert not lab.errors


def warm(picture):
    return int(((picture[..., 0] > 200) & (picture[..., 1] > 90) & (picture[..., 2] < 130)).sum())


@pytest.mark.browser
def test_where_the_model_looks_in_the_browser(lab):
    "A word under the pointer, held, or by keys: the picture shows its heat, and says how much."
    lab.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 5 }")
    browser.command(lab, "notebook:run-cell")
    view = lab.locator(".d2-inspect").nth(1)
    peak, line = (
        np.array(inspect(lab.folder / "spoken").look("rollouts", 0, 0, "first")[0]["peak"]),
        view.locator("[data-pass=first] .heat").first,
    )
    line.wait_for()
    first, words = int(line.get_attribute("data-from")), line.locator("i")
    word = words.nth(
        int(peak[first : first + words.count()].argmax())
    )  # the one that looks hardest

    def says(text):
        return lab.wait_for_function(
            """([t]) => [...document.querySelectorAll('.d2-inspect .d2-status')][1]
              .textContent.includes(t)""",
            arg=[text],
        )

    says("IoU")

    def pixels():
        return browser.shown(view.locator("canvas"))

    before = pixels()
    word.hover()
    says("of its attention is on the picture")
    lab.wait_for_timeout(200)
    assert warm(pixels()) > 300
    assert (pixels() != before).any(-1).mean() > 0.9
    assert "weights" in view.locator(".d2-status").inner_text()
    assert view.locator(".d2-seen").count() == 1
    view.locator("h4").first.hover()
    says("IoU")
    lab.wait_for_timeout(200)
    assert (pixels() == before).all()
    word.click()  # held: the pointer may leave
    view.locator("h4").first.hover()
    lab.wait_for_timeout(300)
    held = view.locator(".d2-status").inner_text()
    assert "of its attention" in held
    view.locator("[data-pass=first] .heat").first.focus()
    lab.keyboard.press("ArrowRight")
    lab.keyboard.press("ArrowRight")
    lab.wait_for_timeout(300)
    assert "of its attention" in view.locator(".d2-status").inner_text() != held
    lab.keyboard.press("Escape")
    says("IoU")
    assert view.locator(".d2-why").is_hidden()
    assert not lab.errors


@pytest.mark.browser
def test_why_there_is_no_heat_is_said_once_in_the_browser(lab):
    "No policy is there that spoke the made-up run: its model is taken away."
    view = lab.locator(".d2-inspect").first
    lab.evaluate(
        """() => {
          const notebook = window.jupyterapp.shell.currentWidget.content;
          notebook.activeCellIndex = 5;
          notebook.activeCell.model.sharedModel.setSource("w.run.parameters['model'] = 'large'");
        }"""
    )
    browser.command(lab, "notebook:run-cell")
    lab.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 0 }")
    view.locator("[data-source=rollouts]").click()
    view.locator("[data-pass=first] .heat i").nth(3).hover()
    view.locator(".d2-why").wait_for()
    assert "large is not loaded for a glance" in view.locator(".d2-why").inner_text()
    before = browser.shown(view.locator("canvas"))
    view.locator("[data-pass=first] .heat i").nth(5).hover()
    lab.wait_for_timeout(400)
    assert (browser.shown(view.locator("canvas")) == before).all()
    assert not lab.errors


@pytest.mark.browser
def test_a_chart_answers_to_the_pointer(lab):
    "Values under the pointer, a legend that hides, a name that is text: plotly in JupyterLab."
    lab.evaluate("() => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = 6 }")
    browser.command(lab, "notebook:run-cell")
    plot = lab.locator(".jp-RenderedPlotly").last
    plot.locator(".trace.scatter").first.wait_for(state="attached")
    plot.scroll_into_view_if_needed()
    assert "<b>bold</b>" in plot.locator(".legendtext").all_text_contents()
    lab.wait_for_timeout(500)
    area = plot.locator(".nsewdrag").first.bounding_box()
    lab.mouse.move(area["x"] + area["width"] / 2, area["y"] + area["height"] / 2)
    plot.locator(".hoverlayer .legendtext").first.wait_for()
    labels = plot.locator(".hoverlayer").text_content()
    assert "step " in labels
    assert "<b>bold</b>" in labels
    lines = plot.locator(".trace.scatter:visible").count()
    plot.locator(".legendtoggle").first.click()
    lab.wait_for_timeout(1000)
    assert plot.locator(".trace.scatter:visible").count() < lines
    assert not lab.errors


# ---- where no widget lives

WIDGET = "application/vnd.jupyter.widget-view+json"


def wait_for_pictures(drawn, n):
    "At least n pictures stand there, loaded and wide; a page draws one after the other."
    loaded = """(images, n) => images.filter(i => i.complete && i.naturalWidth > 400).length >= n
        && images.every(i => i.complete && i.naturalWidth > 400)"""
    until = time.monotonic() + browser.PATIENCE / 1000
    while not drawn.evaluate_all(loaded, n):
        assert time.monotonic() < until, f"{drawn.count()} pictures of {n}, or one not loaded"
        time.sleep(0.2)


@pytest.mark.browser
def test_a_notebook_that_is_not_trusted_shows_the_picture(lab):
    "Where nobody trusts a saved notebook, and on a plain page, stands the still."
    import nbformat

    browser.command(lab, "docmanager:save")
    name = "views.ipynb"
    for _ in range(100):
        nb = nbformat.read(lab.folder / name, as_version=4)
        data = [o.get("data", {}) for c in nb.cells for o in c.outputs]
        stills = [d for d in data if "image/png" in d and WIDGET in d]
        if len(stills) > 2:
            break
        time.sleep(0.2)
    assert len(stills) > 2
    nb.cells[0].source += "\n# from somebody else"  # other words: nobody here has signed them
    nbformat.write(nb, lab.folder / "elsewhere.ipynb")
    other = lab.context.browser.new_page()
    try:
        other.set_default_timeout(browser.PATIENCE)
        browser.opened(other, lab.url.split("/lab/")[0], "elsewhere.ipynb")
        panel = other.locator(
            ".jp-NotebookPanel:not(.lm-mod-hidden)"
        )  # beside it the first notebook may be open, as it was left
        drawn = panel.locator(".jp-OutputArea-output img")
        wait_for_pictures(drawn, len(stills))
        assert panel.locator(".dr2seg").count() == 0
        assert drawn.first.bounding_box()["width"] > 300
        browser.plain_page(lab.folder / "elsewhere.ipynb", lab.folder / "elsewhere.html")
        other.goto((lab.folder / "elsewhere.html").as_uri())
        wait_for_pictures(other.locator("img[src^='data:image/png']"), len(stills))
    finally:
        other.close()


def test_a_description_beyond_the_limit_is_one_sentence():
    asker, replies = Playground("embedded", 2_000_049), []
    asker.send = replies.append
    asker._asked(None, dict(ask="second", description="the ball " * 2000), None)
    assert asker.busy == ""
    assert "shorten it" in replies[0]["error"]
