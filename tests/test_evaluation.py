"Answers to masks to numbers; nothing is skipped."
import numpy as np
import pytest

from dr2seg_lib import dialogue
from dr2seg_lib.evaluation import bootstrap, evaluate, load_data, located, scored, summarise
from dr2seg_lib.policy import Policy
from dr2seg_lib.readers import BrokenRecord
from dr2seg_lib.rollout import Response
from dr2seg_lib.scenes import MiniReasonSeg
from dr2seg_lib.segmenters import Segmenter, load_segmenter

SAMPLE = MiniReasonSeg("val")[0]
said = lambda text: Response(text, dialogue.parse(text), [text], [0.5], [1.0], 7)


def test_located_scales_back_to_the_image():
    text = '<think>x.</think><answer>[{"bbox_2d": [28,56,84,112], "point_2d": [14,0]}]</answer>'
    (t,) = located(text, 112, (224, 448))
    assert t.box == (56, 224, 168, 448) and t.point == (28, 0)
    assert located("nothing here", 112, (224, 224)) == []


def test_an_unparsable_answer_is_a_miss_and_never_skipped():
    row = scored(SAMPLE, said("I do not know"), np.zeros((224, 224), bool))
    assert row["i"] == 0 and row["u"] == SAMPLE.mask.sum() and row["iou"] == 0 and row["format"] == 0


def test_summary_by_hand():
    rows = [dict(i=i, u=u, iou=i / u, tokens=t, answer_entropy=e, format=1.0, tags={"kind": k}) for i, u, t, e, k in [(8, 10, 20, .1, "a"), (1, 2, 40, .3, "b"), (0, 8, 60, .5, "b")]]
    s = summarise(rows)
    assert s["gIoU"] == pytest.approx((.8 + .5) / 3) and s["cIoU"] == pytest.approx(9 / 20) and s["tokens"] == 40 and s["n"] == 3
    b = s["strata"]["kind"]["b"]
    assert (b["gIoU"], b["tokens"], b["n"]) == (.25, 50, 2) and b["cIoU"] == pytest.approx(.1) and b["gIoU_ci"] == [0, .5]
    assert "N_acc" not in s and "broken" not in s


def test_questions_without_an_answer_by_hand():
    row = lambda u, targets: dict(i=0, u=u, iou=float(u == 0), tokens=5, answer_entropy=.1, format=1., targets=targets, tags={})
    s = summarise([row(0, 0), row(7, 0), row(0, 0), row(9, 1)])
    assert s["N_acc"] == pytest.approx(2 / 3) and s["gIoU"] == .5 and s["cIoU"] == 0


def test_a_record_that_cannot_be_read_is_a_miss():
    class Worn(list):
        def __getitem__(self, i):
            if i in (0, 3): raise BrokenRecord(f"record {i} is broken; mend it.")
            return super().__getitem__(i)
    data = Worn(MiniReasonSeg("val", 4))
    policy, segmenter = Policy.load(), load_segmenter("grabcut")
    summary, rows = evaluate(policy, segmenter, data, dialogue.dr2seg, batch_size=3)
    whole, _ = evaluate(policy, segmenter, list(data)[1:3], dialogue.dr2seg)
    assert [r["sample"] for r in rows] == ["#0", data[1].id, data[2].id, "#3"] and rows[3]["error"] == "record 3 is broken; mend it."
    assert summary["n"] == 4 and summary["broken"] == 2 and summary["gIoU"] == pytest.approx(whole["gIoU"] / 2)
    assert summary["cIoU"] == whole["cIoU"] and summary["tokens"] == whole["tokens"] and summary["strata"].keys() == whole["strata"].keys()


def test_nothing_that_can_be_read_has_no_tokens():
    class Worn(list):
        def __getitem__(self, i): raise BrokenRecord("it is broken; mend it.")
    summary, _ = evaluate(Policy.load(), None, Worn([1, 2]), dialogue.dr2seg)
    assert summary["gIoU"] == 0 and summary["tokens"] is None and summary["broken"] == 2 and summary["strata"] == {}
    assert s["gIoU_ci"][0] <= s["gIoU"] <= s["gIoU_ci"][1]


def test_bootstrap_covers_the_mean():
    values = np.random.default_rng(0).normal(3, 1, 400)
    low, high = bootstrap(values)
    assert low < 3 < high and 0.15 < high - low < 0.25 # about 4 / sqrt(400)


def test_truth_drawn_by_an_oracle_scores_one():
    class Oracle(Segmenter):
        def masks(self, image, targets): return [next(s.mask for s in data if s.image is image)]
    data = [MiniReasonSeg("val")[i] for i in range(4)]
    summary, rows = evaluate(Policy.load(), Oracle(), data, dialogue.dr2seg)
    drawn = [r for r in rows if r["format"]]
    assert len(rows) == 4 and drawn and all(r["iou"] == 1 for r in drawn)


def test_same_answers_in_any_batch_size():
    policy, segmenter = Policy.load(), load_segmenter("grabcut")
    a, b = (evaluate(policy, segmenter, MiniReasonSeg("val", 6), dialogue.dr2seg, batch_size=n)[1] for n in (2, 6))
    assert [r["text"] for r in a] == [r["text"] for r in b]


def test_unknown_data_is_named():
    with pytest.raises(FileNotFoundError, match="data: coco does not exist.*called mini"): load_data("coco", "val")
