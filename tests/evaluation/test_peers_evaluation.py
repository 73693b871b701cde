"Evaluation as Seg-Zero and VisionReasoner publish it, written again from their scripts."

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.samples import Sample, Target
from dr2seg_lib.evaluation.metrics import result_row
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.methods.seg_zero import parse_one_object
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.vision import resize_square
from dr2seg_lib.rollouts.parsing import draw_answer, parse_response
from dr2seg_lib.rollouts.response import Response
from dr2seg_lib.segmenters.loading import load_segmenter

FRAME = 840
SCENE = MiniReasonSeg("val")[5]
PHOTO = np.array(Image.fromarray(SCENE.image).resize((333, 211)))  # no square
H, W = PHOTO.shape[:2]
THING = SCENE.scaled(FRAME)[0]


@pytest.fixture(scope="module")
def segmenter():
    return load_segmenter("embedded")


def best(predictor, box, points):
    masks, scores, _ = predictor.predict(
        point_coords=points, point_labels=[1] * len(points), box=box
    )
    return masks[np.argsort(scores)[::-1]][0].astype(bool)


def seg_zero_script(text):
    "Box and points by evaluation_scripts/evaluation.py; None where it raises."
    fx, fy = W / FRAME, H / FRAME
    try:
        data = json.loads(re.search(r"{[^}]+}", text).group(0))
        key = next(k for k in data if "bbox" in k.lower())
        if len(data[key]) != 4:
            return None
        box = [round(int(v) * (fx, fy)[i % 2]) for i, v in enumerate(data[key])]
        keys = [k for k in data if "points" in k.lower()][:2]
        first, second = (data[k] for k in keys)
        points = [[round(int(p[0]) * fx), round(int(p[1]) * fy)] for p in (first, second)]
    except Exception:
        return None
    return box, points


def visionreasoner_script(text):
    "Boxes and points by vision_reasoner_model.py; none where its JSON or its keys are wrong."
    fx, fy = W / FRAME, H / FRAME
    found = re.search(r"<answer>\s*(.*?)\s*</answer>", text, re.DOTALL)
    pairs = []
    for item in json.loads(found.group(1)):
        box = [int(v * (fx, fy)[i % 2] + 0.5) for i, v in enumerate(item["bbox_2d"])]
        pairs.append(
            (box, [[int(item["point_2d"][0] * fx + 0.5), int(item["point_2d"][1] * fy + 0.5)]])
        )
    return pairs


(A, B, C, D), (X, Y) = THING.box, THING.point
ANSWERS = [
    f'<think>a cup</think><answer>{{"bbox": [{A},{B},{C},{D}], '
    f'"points_1": [{X},{Y}], "points_2": [{X + 7},{Y - 9}]}}</answer>',
    f'<think>a cup</think><answer>{{"BBox": [{A}.9,"{B}",{C},{D}], '
    f'"points_a": [{X},{Y},9], "my_points": ["{X}",{Y + 5}]}}</answer>',
    f'no tags: {{"bbox": [{A},{B},{C},{D}], "points_1": [{X},{Y}], "points_2": [{A + 9},{Y}]}} '
    'and {"bbox": [0,0,9,9]}',
]
WRONG = [
    "<think>the {cup}</think>" + ANSWERS[0],
    ANSWERS[0].replace('"', "'"),
    ANSWERS[0].replace("points_2", "place"),
    ANSWERS[0].replace(f",{D}]", "]"),
    ANSWERS[0].replace(f"[{X},{Y}]", f"[{X}]"),
    ANSWERS[0].replace(f"[{X},", '["left",'),
    "<think>a cup</think><answer>the cup</answer>",
    "",
]


@pytest.mark.parametrize("text", ANSWERS)
@pytest.mark.parametrize("name", ["seg_zero", "pixelthink", "dpad"])
def test_seg_zeros_two_points_prompt_sam(segmenter, name, text):
    segmenter.predictor.set_image(PHOTO)
    want = best(segmenter.predictor, *seg_zero_script(text))
    sample = Sample("cup", PHOTO, "the cup", ())
    drawn = draw_answer(segmenter, sample, METHODS[name].parse(text), FRAME)
    assert np.array_equal(drawn, want)
    assert want.any()


@pytest.mark.parametrize("text", WRONG)
def test_what_seg_zeros_script_cannot_read_draws_nothing(segmenter, text):
    assert seg_zero_script(text) is None
    sample = Sample("cup", PHOTO, "the cup", ())
    assert not draw_answer(segmenter, sample, parse_one_object(text), FRAME).any()


values = st.one_of(
    st.integers(-50, 1000), st.floats(-50, 1000), st.sampled_from(["12", "x", None, [1], "3.5"])
)
lists = st.lists(values, max_size=5)
keys = st.sampled_from(["bbox", "Bbox_2d", "points_1", "points_2", "point", "POINTS", "label"])


@settings(max_examples=3000, deadline=None)
@given(st.dictionaries(keys, lists, max_size=6), st.sampled_from(["", "<think>so</think>", "{"]))
def test_answers_are_read_as_seg_zeros_script_reads_them(item, before):
    text = f"{before}<answer>{json.dumps(item)}</answer>"
    want, objects = seg_zero_script(text), parse_one_object(text).objects
    assert (want is None) == (objects is None)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, FRAME), min_size=6, max_size=6))
def test_coordinates_are_rounded_as_published(numbers):
    from dr2seg_lib.rollouts.parsing import to_image_coordinates

    box, point = numbers[:4], numbers[4:]
    single = json.dumps(dict(bbox=box, points_1=point, points_2=point))
    (one,) = to_image_coordinates(parse_one_object(single).objects, FRAME, (W, H))
    assert ([*one.box], [[*one.point], [*one.second]]) == seg_zero_script(single)
    listed = f"<answer>{json.dumps([dict(bbox_2d=box, point_2d=point)])}</answer>"
    (one,) = to_image_coordinates(parse_response(listed).objects, FRAME, (W, H))
    assert [([*one.box], [[*one.point]])] == visionreasoner_script(listed)


def test_visionreasoners_masks_are_joined(segmenter):
    text = (
        '<answer>[{"bbox_2d": [84,210,421,633], "point_2d": [210,315]}, '
        '{"bbox_2d": [500,20,801,333], "point_2d": [605,101]}]</answer>'
    )
    segmenter.predictor.set_image(PHOTO)
    want = np.zeros((H, W), bool)
    for box, points in visionreasoner_script(text):
        want |= best(segmenter.predictor, box, points)
    sample = Sample("two", PHOTO, "both", ())
    assert np.array_equal(draw_answer(segmenter, sample, parse_response(text), FRAME), want)


@pytest.mark.parametrize("side", [112, 840])
def test_pictures_are_resized_as_pil_does_it(side):
    want = Image.fromarray(PHOTO).resize((side, side), Image.BILINEAR)
    assert np.array_equal(resize_square(PHOTO, side, by_area=False), np.array(want))


def test_the_processor_says_how_pictures_are_resized():
    "Qwen's says bicubic and the peers resize before it; the embedded model learned from means."
    policy = Policy.load()
    (own,) = policy.squares([PHOTO])
    assert np.array_equal(own, resize_square(PHOTO, policy.side))
    policy.processor.image_processor.resample = Image.Resampling.BICUBIC
    (peers,) = policy.squares([PHOTO])
    assert np.array_equal(peers, resize_square(PHOTO, policy.side, by_area=False))


@pytest.mark.parametrize(("protocol", "iou"), [("lisa", 1.0), ("visionreasoner", 0.0)])
def test_nothing_drawn_of_nothing(protocol, iou):
    "LISA counts it as right; VisionReasoner's sum divides by nothing and counts 0."
    sample = Sample("none", PHOTO, "a unicorn", ())
    said = Response("", parse_response(""), [""], [0.0], [1.0], 0)
    row = result_row(sample, said, np.zeros((H, W), bool), protocol)
    assert (row["i"], row["u"], row["iou"]) == (0, 0, iou)


def test_something_drawn_of_nothing_is_wrong_under_both():
    sample = Sample("none", PHOTO, "a unicorn", ())
    said = Response("", parse_response(""), [""], [0.0], [1.0], 0)
    for protocol in "lisa", "visionreasoner":
        assert result_row(sample, said, np.ones((H, W), bool), protocol)["iou"] == 0


def test_a_target_with_one_point_and_one_with_two(segmenter):
    "Prompts of both kinds in one call keep their order."
    one = Target((20, 20, 120, 160), (60, 80))
    two = Target((150, 30, 300, 190), (200, 100), second=(250, 90))
    together = segmenter.masks(PHOTO, [one, two, one])
    alone = [segmenter.masks(PHOTO, [t])[0] for t in (one, two)]
    assert [np.array_equal(a, b) for a, b in zip(together, [*alone, alone[0]])] == [True] * 3
