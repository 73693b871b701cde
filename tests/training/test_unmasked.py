"The peers' training sets have no masks: training, the report and every view live without."

import io
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from invented_runs import Reader
from PIL import Image

from dr2seg_lib.cli import main
from dr2seg_lib.data.datasets import open_data
from dr2seg_lib.data.mini import draw_sample
from dr2seg_lib.runs.status import run_status
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.playground import Playground

SIZE = 300, 200  # of the pictures; the solutions are in a square frame of 840


def png(image):
    "A picture as the bytes of a PNG file of another shape than the frame."
    out = io.BytesIO()
    Image.fromarray(image).resize(SIZE).save(out, format="PNG")
    return out.getvalue()


def framed(values):
    return [round(v * 840 / 224) for v in values]  # from the pixels of a drawn scene


def vision_reasoner(targets):
    "The solution of a row of VisionReasoner_multi_object_7k_840."
    return json.dumps([dict(bbox_2d=framed(t.box), point_2d=framed(t.point)) for t in targets])


def seg_zero(targets):
    "The solution of a row of Seg-Zero's refCOCOg_2k_840."
    (x1, y1, x2, y2), (x, y) = framed(targets[0].box), framed(targets[0].point)
    return f"<box>({x1},{y1}),({x2},{y2})</box> <points>({x},{y}),({x + 1},{y + 1})</points>"


FORMS = dict(vision_reasoner=vision_reasoner, seg_zero=seg_zero)


def write(file, form, rows=8):
    "A training set of the hub, field by field as its authors have written it."
    drawn = [draw_sample(1_000_000 + i) for i in range(rows)]
    columns = dict(
        id=[f"{form}_{i}" for i in range(rows)],
        problem=[s.query for s in drawn],
        solution=[FORMS[form](s.targets) for s in drawn],
        image=[dict(bytes=png(s.image), path=f"{i}.png") for i, s in enumerate(drawn)],
        img_height=[SIZE[1]] * rows,
        img_width=[SIZE[0]] * rows,
    )
    pq.write_table(pa.table(columns), file)
    return file


def masked(folder, rows=3):
    "A set of one's own with masks, to evaluate on."
    folder.mkdir()
    lines = []
    for i in range(rows):
        s = draw_sample(2_000_000 + i)
        Image.fromarray(s.image).save(folder / f"{i}.png")
        Image.fromarray(s.mask).save(folder / f"{i}.mask.png")
        lines.append(
            dict(id=f"own-{i}", image=f"{i}.png", query=s.query, mask=f"{i}.mask.png", split="val")
        )
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(
    scope="module",
    params=[("vision_reasoner", False), ("seg_zero", False), ("vision_reasoner", True)],
    ids=["vision_reasoner", "seg_zero", "evaluated"],
)
def trained(request, tmp_path_factory):
    "A run on a training set of each form; the third is evaluated on a set with masks."
    (form, evaluated), folder = request.param, tmp_path_factory.mktemp("peers")
    file, out = write(folder / f"{form}.parquet", form), folder / "run"
    given = dict(
        data=file,
        recipe="visionreasoner" if form == "seg_zero" else "dr2seg",
        steps=1,
        prompts=2,
        samples=2,
        max_new_tokens=150,
        eval_samples=0,
    )
    if evaluated:
        given |= dict(eval_data=masked(folder / "own"), eval_samples=3)
    code = main(
        [
            "run",
            "train",
            "--out",
            str(out),
            *(str(x) for k, v in given.items() for x in ("-p", k, v)),
        ]
    )
    return out, code, evaluated


def test_the_command_ends_well_and_reports(trained):
    out, code, _ = trained
    assert code == 0
    assert run_status(out) == "done"
    assert (out / "report.html").is_file()
    assert not (out / "error.log").exists()


def test_the_report_draws_the_true_box_and_no_iou(trained):
    out, _, evaluated = trained
    html = (out / "report.html").read_text()
    rollouts = html[html.index('<section id="rollouts">') :]
    assert not Reader(html).open
    assert len(re.findall(r'class="l-truth given"', rollouts)) == 4, (
        "one for each picture of two groups of two"
    )
    assert "IoU –" in rollouts
    assert not re.search(r"IoU \d", rollouts)
    assert "l-missed" not in rollouts
    assert "l-extra" not in rollouts
    assert evaluated == (re.search(r"IoU \d", html) is not None), (
        "held-out samples with masks keep theirs"
    )


def test_the_inspector_shows_box_and_point(trained):
    out, _, _ = trained
    view = inspect(out)
    assert view.shown["image"]
    assert view.shown["truth"] is None
    assert view.shown["note"] == ""
    sample = view.run.sample("rollouts", 0)
    assert view.shown["given"][0]["box"] == pytest.approx(sample.targets[0].box, abs=0.06)
    answer = view.answer("rollouts", 0, 0)
    assert answer["iou"] is None
    assert answer["note"] == ""
    assert sum(answer["runs"]) == SIZE[0] * SIZE[1]
    assert view.still()._repr_mimebundle_()[0]["image/png"]
    json.dumps(
        {k: v for k, v in view.get_state().items() if k in ("about", "index", "shown")},
        allow_nan=False,
    )


def test_ask_about_a_sample_without_masks(tmp_path):
    sample = open_data(write(tmp_path / "x.parquet", "vision_reasoner", 1), "train")[0]
    view = Playground(about=sample, max_new_tokens=8)
    assert view.picture["truth"] is None
    assert view.picture["given"][0]["box"]
    view._asked(view, dict(ask="segment", box=sample.targets[0].box), [])
    assert view.drawn["iou"] is None
    assert view.still()._repr_mimebundle_()[0]["image/png"]
