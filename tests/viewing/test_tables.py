"The papers' figures, ours beside them, and what keeps them apart."

import re

import pytest

from dr2seg_lib.cli import main
from dr2seg_lib.core.files import write_json
from dr2seg_lib.core.markup import latex_text
from dr2seg_lib.core.statistics import Interval
from dr2seg_lib.evaluation.published import COLUMN_TITLES, published_tables
from dr2seg_lib.viewing.paper_rows import set_name
from dr2seg_lib.viewing.paper_tables import caveats, format_tables, side_by_side

SUMMARY = dict(
    n=200,
    tokens=30.0,
    tokens_ci=[28.0, 32.0],
    gIoU=0.661,
    gIoU_ci=[0.62, 0.70],
    cIoU=0.64,
    cIoU_ci=[0.59, 0.69],
    strata={},
)


@pytest.fixture
def run(tmp_path):
    "A function that writes a run's folder."

    def write(name="mine", results=None, status="done", **parameters):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        write_json(
            folder / "run.json",
            dict(
                status=status,
                parameters=dict(recipe="dr2seg", model="embedded", adapter="", segmenter="embedded")
                | parameters,
            ),
        )
        if results is not None:
            write_json(folder / "results.json", results)
        return folder

    return write


def evaluation(data="/data/ReasonSeg", format="ReasonSeg", split="val", protocol="lisa", **more):
    return (
        SUMMARY
        | dict(evaluation=dict(data=data, format=format, split=split, protocol=protocol))
        | more
    )


def where(folder):
    return [
        t
        for t, (table, _) in side_by_side([folder]).items()
        if any(r[0].startswith("ours") for r in table.rows)
    ]


def test_published_figures_are_those_of_methods():
    "Spot checks, each typed from docs/methods.md §7 once more."
    rows = {
        (t, r["method"], r["on"]): (r["tokens"], r["gIoU"], r["cIoU"])
        for t, rs in published_tables().items()
        for r in rs
    }
    assert len(rows) == 20 + 19 + 3 * 14 + 3 + 4 + 4 + 2 + 3 + 20 + 12 + 10
    assert rows["ReasonSeg val", "PixelThink-7B", "ReasonSeg val"] == (46.9, 63.8, 62.6)
    assert rows["ReasonSeg test", "DR²Seg-7B", "ReasonSeg test"] == (55.4, 64.8, 62.8)
    assert rows["Referring expressions", "DR²Seg*", "RefCOCO testA"] == (None, 79.3, None)
    assert rows["Referring expressions", "Seg-Zero", "RefCOCO+ testA"][1] == 76.2
    assert rows["What the reward terms do", "+ R_desc", "ReasonSeg val"] == (56.1, 67.6, None)
    assert rows["The anchor N0", "N0 = 25", "ReasonSeg val"][0] == 70.7
    assert rows["Models of 3B", "DR²Seg-3B", "ReasonSeg"] == (23.9, 65.5, 56.8)
    assert rows["SAM 3 as segmenter", "DR²Seg without R_len", "ReasonSeg"] == (63.7, 68.7, 64.8)
    assert rows["Strata", "DPAD, logic", "ReasonSeg test"] == (68.30, 47.03, None)
    assert rows["Strata", "Seg-Zero, easy", "ReasonSeg test"][1] == 68.37
    assert rows["ReasonSeg val", "LISA-7B*", "ReasonSeg val"] == (None, 61.3, 62.9)
    assert rows["ReasonSeg test", "CoReS-7B*", "ReasonSeg test"] == (None, 52.4, None)
    assert rows["Referring expressions", "LISA-7B", "RefCOCOg test"] == (None, None, 68.5)
    assert rows["Rewards of the caption", "scaled", "ReasonSeg test"] == (None, 58.4, 57.5)
    assert rows["Rewards of the caption", "difference", "RefCOCO testA"][1] == 77.2
    found = {(r["method"], r["on"]): r for r in published_tables()["Discrimination"]}
    plus = "RefCOCO+ testA"
    assert [found["DPAD", plus][k] for k in ("tokens", "SNR", "TSNR")] == [62.88, 1.34, 1.14]
    assert found["Seg-Zero (DPAD's data)", "ReasonSeg val"]["TSNR"] == 0.98
    assert all(r["protocol"] == "as published" for rs in published_tables().values() for r in rs)


@pytest.mark.parametrize(
    "data, format, split, name",
    [
        ("Ricky06662/ReasonSeg_test", "parquet of the hub", "test", "ReasonSeg test"),
        ("Ricky06662/refcoco_testA", "parquet of the hub", "testA", "RefCOCO testA"),
        ("x/reason_seg/ReasonSeg", "ReasonSeg", "val", "ReasonSeg val"),
        ("/d/refcoco+", "RefCOCO", "testA", "RefCOCO+ testA"),
        ("mini", "MiniReasonSeg", "val", "mini val"),
        ("/photos/of_mine", "ReasonSeg", "test", "of_mine test"),
        ("/d/ReasonSeg/own", "a folder of one's own", "val", "own val"),
    ],
)
def test_names_of_sets(data, format, split, name):
    assert set_name(dict(data=data, format=format, split=split)) == name


def test_an_evaluation_stands_in_the_table_of_its_set(run):
    assert where(run("a", evaluation())) == ["ReasonSeg val"]
    assert where(
        run(
            "b",
            evaluation("Ricky06662/refcocog_test", "parquet of the hub", protocol="visionreasoner"),
        )
    ) == ["Referring expressions"]
    assert where(run("c", evaluation("mini", "MiniReasonSeg"))) == ["Other data"]
    assert where(
        run("d", evaluation(), model="Qwen/Qwen2.5-VL-3B-Instruct", segmenter="facebook/sam3")
    ) == ["ReasonSeg val", "Models of 3B", "SAM 3 as segmenter"]
    easy = dict(n=50, gIoU=0.7, tokens=20.0, cIoU=None)
    folder = run(
        "e",
        evaluation(strata=dict(difficulty=dict(easy=easy))),
        adapter="runs/few/checkpoints/step-000070",
    )
    assert where(folder) == ["ReasonSeg val", "Strata"]
    found = side_by_side([folder])
    assert found["ReasonSeg val"][0].rows[-1] == [
        "ours: e, DR²Seg, embedded + few/checkpoints/step-000070",
        "ReasonSeg val",
        "lisa",
        "200",
        "30.0 ± 2.0",
        "66.1 ± 4.0",
        "64.0 ± 5.0",
    ]
    assert found["Strata"][0].rows[-1][1:] == ["ReasonSeg val", "lisa", "50", "20.0", "70.0", "–"]


def test_an_ablation_is_a_row_an_arm(run):
    def arm(*gIoU):
        return [dict(n=512, tokens=70.0, gIoU=g, cIoU=0.5) for g in gIoU]

    folder = run(
        "abl",
        dict(arms=dict(visionreasoner=arm(0.6, 0.62), dr2seg=arm(0.5), mine=arm(0.3), failed=[])),
        settings=dict(gamma=0.1),
    )
    run(
        "abl/dr2seg-s0",
        dict(evaluation=dict(data="mini", format="MiniReasonSeg", split="val", protocol="lisa")),
    )
    found = side_by_side([folder])
    table, note = found["What the reward terms do"]
    assert [(r[0], r[1], r[3]) for r in table.rows[3:]] == [
        ("ours: abl, none (visionreasoner)", "mini val", "512 × 2 seeds"),
        ("ours: abl, + R_len (dr2seg)", "mini val", "512"),
        ("ours: abl, mine", "mini val", "512"),
    ]
    assert table.rows[3][5] == "61.0 ± 12.7"
    assert table.rows[4][5] == "50.0"  # t of one degree of freedom: 12.71 · 1.41/√2
    assert found["The slope γ"][0].rows[-1][0] == "ours: abl, γ = 0.1"
    assert not any(r[0].startswith("ours") for r in found["The anchor N0"][0].rows)


def test_protocols_are_never_mixed_in_silence(run):
    both = [run("a", evaluation()), run("b", evaluation(protocol="visionreasoner"))]
    note = side_by_side(both)["ReasonSeg val"][1]
    assert "Protocols differ (as published, lisa, visionreasoner)" in note
    assert "do not compare" in note
    one = dict(
        method="ours: a", on="x", protocol="lisa", tokens=Interval(1.0), gIoU=None, cIoU=None
    )
    assert caveats([one]) == ""
    assert caveats([one, one | dict(on="y")]).startswith("Data differ (x, y)")
    assert "Protocols differ" in caveats([one, one | dict(protocol="visionreasoner")])
    assert all(note == "" for _, note in side_by_side([]).values()), "the papers alone"
    for format in ("markdown", "latex", "html"):
        assert "Protocols differ" in format_tables(side_by_side(both), format)


def test_training_runs_are_told_with_what_is_known(run):
    found = side_by_side(
        [run("t", dict(before=SUMMARY, after=SUMMARY | dict(tokens=9.0, tokens_ci=[8.0, 10.0])))]
    )["Other data"][0]
    assert [r[0] for r in found.rows] == [
        "ours: t, DR²Seg, before training",
        "ours: t, DR²Seg, after training",
    ]
    assert found.rows[1][1:5] == ["not recorded", "not recorded", "200", "9.0 ± 1.0"]


def test_latex_has_no_bare_specials(run):
    folder = run("a_b&c%", evaluation(), model="x/y_z#1")
    text = format_tables(side_by_side([folder]), "latex")
    assert r"a\_b\&c\%" in text
    assert r"y\_z\#1" in text
    assert r"$\pm$" in text
    assert r"$^2$" in text
    assert not re.search(r"[²γ±−–×]", text)
    assert (
        text.count(r"\begin{tabular}")
        == text.count(r"\end{tabular}")
        == len(side_by_side([folder]))
    )
    assert all(
        line.count(" & ") in (len(COLUMN_TITLES) - 1, len(COLUMN_TITLES) + 1)
        for line in text.splitlines()
        if line.endswith(r"\\")
    )
    assert latex_text("\\{}~^$") == r"\textbackslash{}\{\}\textasciitilde{}\textasciicircum{}\$"


def test_html_is_a_page_and_escapes(run):
    page = format_tables(side_by_side([run("<b>", evaluation())]), "html")
    assert page.startswith("<!doctype html>")
    assert '<meta charset="utf-8">' in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert page.count("<table>") == page.count("</table>")


def test_the_command(run, tmp_path, capsys):
    assert main(["tables"]) == 0
    assert "| DR²Seg* | ReasonSeg test | as published |" in capsys.readouterr().out
    assert main(["tables", str(run("a", evaluation())), "--format", "latex"]) == 0
    assert r"ours: a, DR$^2$Seg, embedded" in capsys.readouterr().out
    for folder, says in (
        (tmp_path / "nowhere", "run.json does not exist"),
        (
            run("b", status="interrupted"),
            "b is interrupted and has no results yet; resume the run or leave it out.",
        ),
        (run("c", {}), "c has no figures for the tables; give runs of evaluate, ablate or train."),
    ):
        assert main(["tables", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("dr2seg: ")
        assert err.count("\n") == 1
        assert says in err
