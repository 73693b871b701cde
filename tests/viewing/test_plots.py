"Intervals against scipy, tables that survive any text, figures of any rows, masks in place."

import html
import io
import json
import math
import re
import xml.etree.ElementTree as xml

import cv2
import hostile_runs as hostile
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from dr2seg_lib.core.statistics import Interval, bootstrap_interval, mean_interval
from dr2seg_lib.core.text_table import rows_table
from dr2seg_lib.data.mini import draw_sample
from dr2seg_lib.viewing.axes import Panel
from dr2seg_lib.viewing.charts import PLOTLY, Chart
from dr2seg_lib.viewing.comparison_plots import before_after_plot, token_comparison_plot
from dr2seg_lib.viewing.curves import (
    STAGE_COLOURS,
    moving_average,
    reward_terms_plot,
    stage_seconds_plot,
    training_curves,
    training_health,
)
from dr2seg_lib.viewing.discrimination import similarity_scatter, token_strata_plot
from dr2seg_lib.viewing.figures import figure_svg, panels
from dr2seg_lib.viewing.marks import Arrow, Bars, Line, Points, plotly_text
from dr2seg_lib.viewing.overlays import overlay
from dr2seg_lib.viewing.style import METHOD_COLOURS, MUTED, OTHER_COLOURS, arm_colours
from dr2seg_lib.viewing.tables import arms_table, before_after_table, paired_change

number = st.none() | st.just(math.nan) | st.floats(-1e6, 1e6) | st.integers(-5, 5)
values = st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20)


@given(values)
def test_mean_interval_is_students(v):
    m = mean_interval(v)
    lo, hi = stats.t.interval(0.95, len(v) - 1, np.mean(v), max(stats.sem(v), 1e-300))
    assert m.mean == pytest.approx(np.mean(v))
    assert (m.lo, m.hi) == pytest.approx((lo, hi), abs=1e-6)


def test_mean_interval_by_hand():
    assert mean_interval([1, 2, 3]) == pytest.approx(
        (2, 2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3))
    )
    one = mean_interval([0.5])
    assert one.mean == 0.5
    assert math.isnan(one.lo)
    assert f"{one:.2f}" == "0.50"
    for f in mean_interval, bootstrap_interval:
        with pytest.raises(ValueError, match="at least one value"):
            f([])


def test_bootstrap_covers_and_repeats():
    rng = np.random.default_rng(1)
    v = rng.normal(3, 1, 400)
    b = bootstrap_interval(v)
    assert b == bootstrap_interval(v) != bootstrap_interval(v, seed=1)
    assert (b.lo, b.hi) == pytest.approx((v.mean() - 1.96 / 20, v.mean() + 1.96 / 20), abs=0.02)
    assert bootstrap_interval([2, 2, 2]) == (2, 2, 2)
    hits = [
        b.lo < 0 < b.hi for b in (bootstrap_interval(rng.normal(size=60), n=200) for _ in range(60))
    ]
    assert np.mean(hits) > 0.85


def test_interval_formats():
    assert f"{Interval(0.5, 0.4, 0.6):.2f}" == "0.50 ± 0.10"
    assert f"{Interval(-3, -5, -1):+.1f}" == "-3.0 ± 2.0"


@given(
    st.lists(
        st.dictionaries(st.sampled_from("ab"), st.none() | st.text() | st.floats() | st.integers())
    )
)
def test_table_keeps_its_shape(rows):
    "Whatever is in a cell, Markdown has one line a row and HTML is well formed."
    rows = [
        {
            k: v if isinstance(v, (str, type(None))) or math.isfinite(v) else None
            for k, v in r.items()
        }
        for r in rows
    ]
    rows = [
        {
            k: re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]", " ", v)
            if isinstance(v, str)
            else v
            for k, v in r.items()
        }
        for r in rows
    ]
    t = rows_table(rows, dict(a="", b=("B", "g")))
    assert len(t.markdown.splitlines()) == len(rows) + 2
    cells = xml.fromstring(t.html.replace(" class=num", "")).findall(".//td")
    assert len(cells) == 2 * len(rows)
    assert all((c.text or "") == w for c, w in zip(cells, sum(t.rows, [])))


def test_change_is_paired():
    "Samples of one list count nowhere; a constant difference has no width."
    before = [
        dict(sample=i, tokens=float(10 * i), iou=0.1 * i, i=i, u=10, answer_entropy=None)
        for i in range(8)
    ]
    after = [
        dict(r, tokens=r["tokens"] - 7, iou=r["iou"] + 0.05, i=r["i"] + 1) for r in before[2:]
    ] + [dict(sample=99, tokens=1e9, iou=1.0, i=1, u=1)]
    assert paired_change("tokens", before, after) == pytest.approx((-7, -7, -7))
    assert paired_change("gIoU", before, after) == pytest.approx((0.05,) * 3)
    assert paired_change("cIoU", before, after) == pytest.approx((0.1,) * 3)
    assert paired_change("answer_entropy", before, after) is None
    assert paired_change("tokens", [], after) is None


def test_before_after_table_without_evaluation():
    assert (
        before_after_table({}).rows == before_after_table(dict(before=None, after=None)).rows == []
    )
    assert before_after_table(dict(before=None, after=dict(tokens=5.0))).rows == [
        ["tokens", "–", "5.0", "–"]
    ]


def test_arms_table():
    t = arms_table(
        dict(a=[dict(tokens=10.0, gIoU=0.5), dict(tokens=12.0, gIoU=None)], b=[{}]),
        start=dict(tokens=90.0),
    )
    assert t.rows == [
        ["start", "", "90.0", "–", "–", "–"],
        ["a", "2", "11.0 ± 12.7", "0.500", "–", "–"],
        ["b", "1", "–", "–", "–", "–"],
    ]


def test_colours():
    c = arm_colours(["dr2seg", "mine", "visionreasoner", "yours", *"abcdef"])
    assert c["dr2seg"] == METHOD_COLOURS["dr2seg"]
    assert c["mine"] != c["yours"]
    assert arm_colours([""])[""] == c["dr2seg"]


def luminance(colour):
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return np.dot(
        [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb],
        [0.2126, 0.7152, 0.0722],
    )


@pytest.mark.parametrize(
    "colour", [MUTED, *METHOD_COLOURS.values(), *OTHER_COLOURS, *STAGE_COLOURS.values()]
)
def test_colours_are_seen_on_white_and_on_black(colour):
    "Lines keep a contrast of 2.7 on the white and the dark panel; WCAG asks 3 of lone graphics."
    light, dark, own = luminance("#ffffff"), luminance("#1b1e24"), luminance(colour)
    assert (light + 0.05) / (own + 0.05) > 2.7
    assert (own + 0.05) / (dark + 0.05) > 2.7


@pytest.mark.parametrize("keep", [0, 0.6, 0.99])
@given(v=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_smooth_stays_within(keep, v):
    s = moving_average(v, keep)
    assert len(s) == len(v)
    assert s[0] == pytest.approx(v[0])
    assert min(v) - 1e-6 <= s.min()
    assert s.max() <= max(v) + 1e-6
    if keep == 0:
        assert s == pytest.approx(v)


names = [
    "answer_entropy",
    "tokens",
    "tokens_second",
    "accuracy",
    "reward",
    "kl",
    "lr",
    "loss",
    "grad_norm",
]
row = st.fixed_dictionaries(
    {"step": st.integers(1, 9)},
    optional={n: number for n in names}
    | {
        "terms": st.none()
        | st.dictionaries(st.sampled_from(["accuracy", "length", "my_term"]), number),
        "seconds": st.none()
        | st.dictionaries(st.sampled_from(["first", "update", "own", "total"]), number),
    },
)


def plain_traces(chart, k):
    "plotly's traces on panel k, without ranges and arrows, as dicts."
    axis = f"x{k + 1}" if k else "x"
    traces = []
    for trace in chart.plotly().to_plotly_json()["data"]:
        arrow = (trace.get("marker") or {}).get("symbol") == "arrow"
        if trace.get("xaxis") == axis and trace.get("fill") is None and not arrow:
            traces.append(trace)
    return traces


def plain_marks(panel):
    return [m for m in panel.marks if isinstance(m, (Line, Points, Bars))]


def check_faces(chart):
    "Both faces hold the names and the numbers of the chart."
    fig = chart.matplotlib()
    for k, (ax, panel) in enumerate(zip(fig.axes, chart.panels)):
        marks = plain_marks(panel)
        curves = [m for m in marks if not isinstance(m, Bars)]
        for line, mark in zip(ax.lines, curves):
            assert line.get_xdata() == pytest.approx(mark.x)
            assert line.get_ydata() == pytest.approx(mark.y)
            assert not mark.name or line.get_label() == mark.name
        heights = [h for m in marks if isinstance(m, Bars) for h in m.y]
        assert [p.get_height() for p in ax.patches] == pytest.approx(heights)
        traces = plain_traces(chart, k)
        assert len(traces) == len(marks)
        for trace, mark in zip(traces, marks):
            assert list(trace["x"]) == pytest.approx(list(mark.x), rel=1e-5)
            assert list(trace["y"]) == pytest.approx(list(mark.y), rel=1e-5)
            assert html.unescape(trace.get("name", "")) == mark.name


@settings(max_examples=8)
@given(st.lists(row, max_size=4, unique_by=lambda r: r["step"]), st.lists(row, max_size=3))
def test_any_rows_make_figures(rows, others):
    "Nothing, one step, missing and non-finite numbers: every figure still draws."
    for f in training_curves, reward_terms_plot, training_health:
        for given_ in rows, {"a": rows}, {"dr2seg": [rows, others], "b": [others]}:
            check_faces(f(given_))
    check_faces(stage_seconds_plot(rows))
    xml.fromstring(training_curves(rows).svg())


def test_a_step_recorded_twice_counts_once():
    twice = [dict(step=6, tokens=3.0), dict(step=6, tokens=-4.0)]
    assert [len(m.x) for m in training_curves(twice).panels[1].marks] == [1, 1]
    check_faces(training_curves(twice))


def curve(values, **more):
    return [dict(step=i + 1, tokens=v, **more) for i, v in enumerate(values)]


def test_curves_show_the_numbers():
    runs = {"visionreasoner": [curve([4, 6]), curve([8, 10, 20])], "dr2seg": [curve([1, 2])]}
    chart = training_curves(runs, keep=0)
    check_faces(chart)
    fig = chart.matplotlib()
    by_colour = {
        line.get_color(): line.get_ydata().tolist()
        for line in fig.axes[1].lines
        if len(line.get_ydata())
    }
    assert by_colour == {
        METHOD_COLOURS["visionreasoner"]: [6, 8, 20],
        METHOD_COLOURS["dr2seg"]: [1, 2],
    }
    band = fig.axes[1].collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band} >= {(1, 4), (1, 8), (2, 6), (2, 10), (3, 20)}
    assert [t.get_text() for t in fig.legends[0].texts] == ["visionreasoner", "dr2seg"]
    assert not training_curves({"dr2seg": [curve([1])]}).matplotlib().legends


def test_seconds_add_up():
    rows = [
        dict(step=s, seconds=dict(first=1.0, update=0.5 * s, total=1 + 0.5 * s))
        for s in range(1, 7)
    ]
    tops = [
        p.get_y() + p.get_height()
        for p in stage_seconds_plot(rows).matplotlib().axes[0].patches[6:]
    ]
    assert tops == pytest.approx([1 + 0.5 * s for s in range(1, 7)])
    fig = stage_seconds_plot(rows, bars=2).matplotlib()
    assert [p.get_y() + p.get_height() for p in fig.axes[0].patches[2:]] == pytest.approx([2, 3.5])
    assert [t.get_text() for t in fig.legends[0].texts] == ["update  1.75 s", "first  1.00 s"]


@pytest.mark.parametrize("rate", [1e-3, 3e-5, 1e-6])
def test_a_learning_rate_has_short_numbers(rate):
    fig = training_health([dict(step=i, lr=rate * (1 - i / 60)) for i in range(60)]).matplotlib()
    fig.draw_without_rendering()
    labels = [label.get_text() for label in fig.axes[-1].get_yticklabels()]
    assert max(map(len, labels)) <= len("2.5e−4")


def test_a_figure_shows_itself_once_and_sharp():
    from matplotlib import pyplot

    fig = training_health(curve([1, 2], kl=0.1)).matplotlib()
    assert pyplot.get_fignums() == []
    data, meta = fig._repr_mimebundle_()
    picture = Image.open(io.BytesIO(data["image/png"]))
    assert picture.size == (2 * meta["image/png"]["width"], 2 * meta["image/png"]["height"])
    assert picture.mode == "RGBA"
    assert picture.getpixel((0, 0))[3] == 0


def test_svg_is_small_and_alone():
    text = figure_svg(
        training_curves(curve(range(60), answer_entropy=0.5, accuracy=0.4)), 'a "label" & more'
    )
    root = xml.fromstring(text)
    assert root.get("aria-label") == 'a "label" & more'
    assert root.get("width") is None
    assert len(text) < 60_000
    assert "font-family" not in text
    assert "metadata" not in text
    assert "url(http" not in text
    assert text == figure_svg(
        training_curves(curve(range(60), answer_entropy=0.5, accuracy=0.4)), 'a "label" & more'
    )


def test_before_after_takes_what_there_is():
    for results in (
        {},
        dict(before=None, after=None),
        dict(after=dict(tokens=1.0, gIoU=0.5)),
        {"mine": dict(before=None, after=dict(tokens=1, gIoU=0.5))},
    ):
        check_faces(before_after_plot(results))


# ---- two faces

ENDS = dict(
    before=dict(tokens=90.0, gIoU=0.6, gIoU_ci=[0.55, 0.65], tokens_ci=[85, 95]),
    after=dict(tokens=30.0, gIoU=0.65),
)


def answered(seed):
    rng = np.random.default_rng(seed)
    names = "s1", "s2", "ts1", "ts2", "iou"
    rows = [dict(zip(names, rng.random(5))) for _ in range(8)]
    tags = [dict(difficulty=("easy", "hard")[i % 2], query_type="logic") for i in range(8)]
    more = [dict(sample=f"mini-{i}", tokens=float(20 + i), tags=t) for i, t in enumerate(tags)]
    return [a | b for a, b in zip(rows, more)]


ANSWERS = dict(dr2seg=answered(0), dpad=answered(1), mine=answered(2))


@pytest.mark.parametrize(
    "chart",
    [
        before_after_plot(ENDS),
        before_after_plot(dict(dr2seg=ENDS, dpad=ENDS)),
        before_after_plot(dict.fromkeys("abcd", ENDS)),
        token_comparison_plot(ANSWERS),
        token_strata_plot(ANSWERS),
        similarity_scatter(ANSWERS),
    ],
    ids=["one", "two", "four", "tokens", "strata", "similarity"],
)
def test_both_faces_show_the_same(chart):
    check_faces(chart)
    titles = [note["text"] for note in chart.layout()["annotations"]]
    for panel, ax in zip(chart.panels, chart.matplotlib().axes):
        assert ax.get_title(loc="left") == panel.title
        assert f"<b>{plotly_text(panel.title)}</b>" in titles


def test_a_legend_entry_stands_for_its_marks():
    "A click on an arm hides its marks in every panel: they share its group, and it names them all."
    chart = training_curves({"visionreasoner": curve([4, 6]), "dr2seg": curve([1, 2])})
    data = chart.plotly().data
    entries = [trace.name for trace in data if trace.showlegend]
    assert entries == ["visionreasoner", "dr2seg"] == list(chart.groups)
    assert {trace.legendgroup for trace in data} == set(entries)
    legend = chart.matplotlib().legends[0]
    assert [text.get_text() for text in legend.texts] == entries


def test_an_arrow_leads_from_start_to_end():
    chart = before_after_plot(ENDS)
    (arrow,) = (mark for mark in chart.panels[0].marks if isinstance(mark, Arrow))
    assert (arrow.start, arrow.end) == ((90.0, 0.6), (30.0, 0.65))
    (trace,) = (t for t in chart.plotly().data if t.marker.symbol == "arrow")
    assert list(zip(trace.x, trace.y)) == [arrow.start, arrow.end]


def hostile_charts(word):
    rows = [dict(step=s, tokens=1.0 * s, terms={word: 0.5}, seconds={word: 1.0}) for s in (1, 2)]
    arms = {word: rows, "other": rows}
    both = before_after_plot({word: ENDS, "other": ENDS})
    return training_curves(arms), reward_terms_plot(arms), stage_seconds_plot(rows), both


@pytest.mark.parametrize("word", hostile.WORDS)
def test_a_name_is_text_for_plotly(word):
    "No tag, no TeX, and the name comes back as it was."
    for chart in hostile_charts(word):
        texts = [trace.name or "" for trace in chart.plotly().data]
        texts += [note["text"] for note in chart.layout()["annotations"]]
        for text in texts:
            assert not set("<>$") & set(re.sub(r"^<b>|</b>$", "", text))
        names = {html.unescape(trace.name or "") for trace in chart.plotly().data}
        assert set(chart.groups) <= names or not chart.has_legend


@pytest.mark.parametrize("word", [w for w in hostile.WORDS if hostile.RUN in w or "$" in w])
def test_a_name_is_text_in_the_svg(word):
    chart = training_curves({word: curve([4, 6]), "other": curve([1, 2])})
    check_faces(chart)
    root = xml.fromstring(chart.svg())
    tags = {element.tag.rsplit("}")[-1] for element in root.iter()}
    assert not {"script", "iframe", "img", "math", "a"} & tags
    assert not [k for e in root.iter() for k in e.attrib if k.lower().startswith("on")]


def test_the_bundle_is_small_and_holds_no_library():
    rows = [dict(step=s, tokens=100.0 / s, accuracy=0.5) for s in range(1, 5001)]
    bundle = training_curves({"a": [rows] * 3, "b": [rows]})._repr_mimebundle_()
    assert set(bundle) == {PLOTLY, "image/svg+xml", "text/plain"}
    spec = json.dumps(bundle[PLOTLY], allow_nan=False)
    assert len(spec) < 300_000
    assert "http" not in spec
    assert len(bundle["image/svg+xml"]) < 300_000
    assert bundle[PLOTLY]["config"]["typesetMath"] is False


def test_a_headless_run_keeps_both_faces():
    "As papermill would: the output of a cell holds plotly's data and an SVG, and no widget."
    import nbformat
    from nbclient import NotebookClient

    source = (
        "from dr2seg_lib.viewing.curves import training_curves\ntraining_curves([dict(step=1)])"
    )
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(nb, timeout=120).execute()
    (output,) = nb.cells[0].outputs
    assert set(output.data) == {PLOTLY, "image/svg+xml", "text/plain"}
    assert output.data["image/svg+xml"].startswith("<svg ")
    assert "widgets" not in nb.metadata


def test_a_chart_is_saved_as_any_figure(tmp_path):
    training_curves(curve([1, 2])).savefig(tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


def test_an_empty_panel_is_drawn():
    check_faces(Chart([Panel("nothing")]))


# ---- pictures


def test_a_picture_shows_itself_transparent():
    fig, axes = panels(["one", "two", "three"], cols=2)
    assert len(axes) == 3
    assert fig._repr_mimebundle_()[0]["image/png"].startswith(b"\x89PNG")


def test_overlay_paints_near_the_mask_only():
    sample = draw_sample(1_000_139)
    plain, painted = overlay(sample.image), overlay(sample.image, sample.mask, fill=0.4)
    inside = (
        cv2.resize(sample.mask.astype(np.uint8), (448, 448), interpolation=cv2.INTER_NEAREST) > 0
    )
    changed = (plain != painted).any(-1)
    core, far = (
        cv2.erode(inside.astype(np.uint8), np.ones((5, 5))) > 0,
        cv2.dilate(inside.astype(np.uint8), np.ones((9, 9))) == 0,
    )
    assert changed[core].all()
    assert not changed[far].any()
    assert np.array_equal(
        plain, cv2.resize(sample.image, (448, 448), interpolation=cv2.INTER_CUBIC)
    )


def test_overlay_keeps_a_hole_open():
    y, x = np.mgrid[:100, :100]
    r = np.hypot(x - 50, y - 50)
    painted = overlay(np.zeros((100, 100, 3), np.uint8), prediction=(r > 20) & (r < 40), scale=1)
    assert not painted[50, 50].any()
    assert not painted[50, 80].any()
    filled = overlay(np.zeros((100, 100, 3), np.uint8), prediction=(r > 20) & (r < 40), fill=0.4)
    assert filled[224, 358].any()
    assert not filled[224, 224].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (64, 48), (600, 900)])
@pytest.mark.parametrize("full", [False, True])
def test_overlay_of_any_size(shape, full):
    image, mask = np.full((*shape, 3), 90, np.uint8), np.full(shape, full)
    before = image.copy()
    out = overlay(image, mask, mask, box=(0, 0, shape[1] - 1, shape[0] - 1), point=(0, 0))
    assert out.dtype == np.uint8
    assert max(out.shape[:2]) == max(448, *shape)
    assert np.array_equal(image, before)
    assert max(overlay(image, mask, scale=2).shape[:2]) == 2 * max(shape)
