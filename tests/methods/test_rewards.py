"Rewards against cases worked out by hand for every rule of docs/methods.md §3, then properties."

import json
import re
from itertools import permutations
from time import process_time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dr2seg_lib.core.masks import box_iou
from dr2seg_lib.data.samples import Target
from dr2seg_lib.methods.dpad import discriminative
from dr2seg_lib.methods.dr2seg import (
    conditional_length,
    description_reward,
    length_reward,
    total_reward,
)
from dr2seg_lib.methods.pixelthink import length_factor
from dr2seg_lib.methods.seg_zero import score as seg_zero
from dr2seg_lib.methods.terms import (
    BLOCKS,
    CAPTIONED,
    DESCRIBED,
    accuracy,
    answer_format,
    best_matching,
    boxes_overlap,
    non_repeat,
    point_in_box,
    thinking_format,
)
from dr2seg_lib.methods.visionreasoner import score as vision_reasoner
from dr2seg_lib.methods.visionreasoner import score_terms
from dr2seg_lib.rollouts.parsing import (
    format_answer,
    format_response,
    parse_answer,
    parse_response,
)

MUG = Target((100, 200, 300, 400), (200, 300))
SPOON = Target((500, 100, 600, 200), (550, 150))
GOOD = '{"bbox_2d": [100,200,300,400], "point_2d": [200,300]}'


def says(*items, think="It has a handle."):
    return f"<think>{think}</think><answer>[{', '.join(items)}]</answer>"


def item(box, point):
    return json.dumps({"bbox_2d": list(box), "point_2d": list(point)})


def terms_of(text, blocks=BLOCKS):
    return score_terms(text, parse_response(text), [MUG], blocks=blocks)


def acc(text, target=(MUG,), **kwargs):
    return vision_reasoner(text, list(target), **kwargs)["accuracy"]


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32))


# VisionReasoner: thinking format


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think></think><answer></answer>", 1),
        (
            "<think>a\nb</think>\n\t <answer>\nc\n</answer>",
            1,
        ),  # line breaks inside, white space between
        ("<think>a</think><answer>b</answer>\n", 0),  # a trailing line break is text after
        (" <think>a</think><answer>b</answer>", 0),
        ("Sure! <think>a</think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer> done", 0),
        ("<think>a</think>so<answer>b</answer>", 0),
        ("<think>a</think>", 0),
        ("<answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("<think>a<answer>b</think></answer>", 0),
        ("<think></answer>", 0),
        ("", 0),
        ("<Think>a</Think><Answer>b</Answer>", 0),
        ("<think>a</think>x</think><answer>b</answer>", 1),  # a full match stretches the lazy parts
        ("<think><think>a</think></think><answer>b</answer>", 1),  # nested
        ("<think>a</think><answer>b</answer>c</answer>", 1),
        ("<think>a</think><answer>b</answer><think>a</think><answer>b</answer>", 1),
        ("<think>a</think><description>d</description><answer>b</answer>", 0),
    ],
)
def test_thinking_format(text, want):
    assert thinking_format(text) == want
    assert terms_of(text)["thinking_format"] == want


@pytest.mark.parametrize(
    "text, want",
    [
        ("<think>a</think><description>d</description><answer>b</answer>", 1),
        ("<think>a</think> <description>d</description>\n<answer>b</answer>", 1),
        ("<think>a</think><description></description><answer>b</answer>", 1),
        ("<think>a</think><answer>b</answer>", 0),  # missing
        ("<think>a</think><answer>b</answer><description>d</description>", 0),  # wrong order
        ("<description>d</description><think>a</think><answer>b</answer>", 0),
        (
            "<think>a<description>d</description></think><answer>b</answer>",
            0,
        ),  # inside the thinking
        ("<think>a</think><description>d<answer>b</answer>", 0),  # never closed
        ("<think>a</think><description>d</description>x<answer>b</answer>", 0),
        ("<think>a</think><description>d</description><answer>b</answer>\n", 0),
    ],
)
def test_thinking_format_with_description(text, want):
    assert thinking_format(text, DESCRIBED) == want
    assert terms_of(text, DESCRIBED)["thinking_format"] == want


soup = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<description>",
            "</description>",
            "<answer>",
            "</answer>",
            " ",
            "\n",
            "a",
            ".",
        ]
    ),
    max_size=14,
).map("".join)


@settings(max_examples=500)
@given(soup | soup.map(lambda s: f"<think>{s}</answer>"))
def test_thinking_format_is_the_regular_expression(text):
    two, three = (
        r"<think>.*?</think>\s*<answer>.*?</answer>",
        r"<think>.*?</think>\s*<description>.*?</description>\s*<answer>.*?</answer>",
    )
    assert thinking_format(text) == bool(re.fullmatch(two, text, re.DOTALL))
    assert thinking_format(text, DESCRIBED) == bool(re.fullmatch(three, text, re.DOTALL))


# VisionReasoner: answer format

BOX, POINT = '"bbox_2d": [1,2,3,4]', '"point_2d": [2,3]'


@pytest.mark.parametrize(
    "answer, want",
    [
        (f"[{{{BOX}, {POINT}}}]", 2),
        (f"[{{{BOX}}}]", 1),
        (f"[{{{POINT}}}]", 1),
        ('[{"label": "mug"}]', 0),
        (f"[{{{BOX}, {POINT}}}, {{{BOX}}}]", 1.5),  # the mean over items
        (f"[{{{BOX}, {POINT}}}, {{}}, {{}}, {{}}]", 0.5),
        ('[{"bbox_2d": [1,2,3], "point_2d": [2,3]}]', 1),
        ('[{"bbox_2d": [1,2,3,4,5], "point_2d": [2,3,4]}]', 0),
        (
            '[{"bbox_2d": "1234", "point_2d": {"x": 1, "y": 2}}]',
            0,
        ),  # four and two of something, but no lists
        (
            '[{"bbox_2d": ["1","2","3","4"], "point_2d": ["2","3"]}]',
            2,
        ),  # number types are not checked
        ('[{"bbox_2d": [null,true,[],{}], "point_2d": [NaN,1e999]}]', 2),
        ("[]", 0),
        ("{}", 0),
        ("null", 0),
        ("7", 0),
        ('"bbox_2d"', 0),
        (f"{{{BOX}, {POINT}}}", 0),  # the object without its list
        (f"[{{{BOX}, {POINT}}}", 0),  # broken JSON counts nothing
        (
            f"[{{{BOX}, {POINT}}}, 7, {{{BOX}, {POINT}}}]",
            2 / 3,
        ),  # what was counted before the error stays
        (f"[7, {{{BOX}, {POINT}}}]", 0),
        (f"[{{{BOX}, {POINT}}}, null]", 1),
        (f'[{{{BOX}, {POINT}}}, "a bbox_2d"]', 1),  # looked into, and raises
        (
            f'[{{{BOX}, {POINT}}}, "text", [], {{{BOX}, {POINT}}}]',
            1,
        ),  # can be looked into, holds nothing: 4 of four items
    ],
)
def test_answer_format(answer, want):
    assert terms_of(f"<answer>{answer}</answer>")["answer_format"] == pytest.approx(want)
    assert vision_reasoner(f"<think>.</think><answer> {answer}\n</answer>", [MUG])[
        "format"
    ] == pytest.approx(1 + want)


def test_only_the_first_answer_block_counts():
    both = f"<think>a</think><answer>[{GOOD}]</answer><answer>none</answer>"
    assert vision_reasoner(both, [MUG]) == dict(format=3, non_repeat=1, accuracy=3)
    assert vision_reasoner(
        f"<think><answer>none</answer></think><answer>[{GOOD}]</answer>", [MUG]
    ) == dict(format=1, non_repeat=1, accuracy=0)


def test_answer_format_of_no_answer():
    assert answer_format(None) == 0
    assert terms_of("<think>a</think>")["answer_format"] == 0


# VisionReasoner: accuracy


def test_all_right():
    assert vision_reasoner(says(GOOD), [MUG]) == dict(format=3, non_repeat=1, accuracy=3)


@pytest.mark.parametrize(
    "box, want",
    [
        ((0, 0, 4, 9), False),  # 50/100: exactly half is not enough
        ((0, 0, 5, 9), True),  # 60/100
        ((0, 0, 9, 9), True),
        ((0, 0, 19, 9), False),  # 100/200
        ((0, 0, 18, 9), True),  # 100/190
        ((9, 9, 0, 0), False),  # inside out
        ((9, 0, 0, 9), False),
        ((0.0, 0, 4.5, 9), True),  # 5.5·10/100
    ],
)
def test_iou_threshold_is_strict(box, want):
    assert boxes_overlap(Target(box, (0, 0)), Target((0, 0, 9, 9), (0, 0))) == want


def test_iou_threshold_in_a_response():
    truth = Target((0, 0, 799, 799), (700, 700))  # corners and point are far off in both
    assert acc(says(item((0, 0, 399, 799), (0, 0))), [truth]) == 0  # 400·800 of 800·800
    assert acc(says(item((0, 0, 400, 799), (0, 0))), [truth]) == 1


def test_areas_count_both_ends():
    # 1×1 in 1×2 pixels: 1/2 with inclusive areas, though 0/1 without
    assert not boxes_overlap(Target((5, 5, 5, 5), ()), Target((5, 5, 6, 5), ()))
    assert boxes_overlap(Target((5, 5, 6, 5), ()), Target((5, 5, 7, 5), ()))  # 2/3


@pytest.mark.parametrize(
    "errors, want",
    [
        ((10, 10, 10, 10), 0),
        ((10, 10, 10, 9), 1),
        ((-10, 10, -10, 10), 0),
        ((40, 0, 0, 0), 0),
        ((39, 0, 0, 0), 1),
        ((0, 0, 0, -39.9), 1),
        ((0, 0, 0, 0), 1),
    ],
)
def test_corner_threshold_is_strict(errors, want):
    box = [v + e for v, e in zip(MUG.box, errors)]
    assert (
        acc(says(item(box, (0, 0)))) == 1 + want
    )  # the IoU holds throughout; the point is far off


@pytest.mark.parametrize(
    "dx, dy, want",
    [
        (30, 0, 0),
        (29, 0, 1),
        (0, -30, 0),
        (18, 24, 0),
        (18, 23, 1),
        (-18, -24, 0),
        (21, 21, 1),
        (22, 21, 0),
        (29.9, 0, 1),
    ],
)
def test_point_threshold_is_strict(dx, dy, want):
    assert acc(says(item(MUG.box, (200 + dx, 300 + dy)))) == 2 + want  # 18² + 24² = 30²


@pytest.mark.parametrize(
    "point, want",
    [
        ((110, 300), 1),
        ((109, 300), 0),
        ((110, 290), 1),
        ((300, 310), 1),
        ((301, 300), 0),
        ((110, 410), 1),
        ((110, 411), 0),
        ((110, 289), 0),
    ],
)
def test_point_must_be_in_its_own_box_edges_included(point, want):
    own = (110, 290, 300, 410)  # the prediction's box
    truth = Target(
        (0, 0, 839, 839), point
    )  # the true point is the very same, in a true box that holds it
    assert acc(says(item(own, point)), [truth]) == want  # neither IoU nor corners
    assert point_in_box(point, own) == want


def test_the_true_box_does_not_matter_for_the_point():
    truth = Target((100, 200, 150, 250), (105, 205))
    assert (
        acc(says(item((95, 195, 120, 220), (95, 195))), [truth]) == 1
    )  # outside the true box, inside its own, 14 px off


@pytest.mark.parametrize(
    "bad",
    [
        '{"bbox_2d": [100,200,300,400]}',
        '{"point_2d": [200,300]}',
        "{}",
        "7",
        "null",
        "[]",
        '"text"',
        '{"bbox_2d": [100,200,300], "point_2d": [200,300]}',
        '{"bbox_2d": [100,200,300,400], "point_2d": [200,300,0]}',
        '{"bbox_2d": ["100","200","300","400"], "point_2d": ["200","300"]}',
        '{"bbox_2d": [100,200,300,null], "point_2d": [200,300]}',
        '{"bbox_2d": [100,200,300,true], "point_2d": [200,300]}',
        '{"bbox_2d": [100,200,300,NaN], "point_2d": [200,300]}',
        '{"bbox_2d": [100,200,300,1e999], "point_2d": [200,300]}',
        '{"bbox_2d": [100,200,300,400], "point_2d": [[200],[300]]}',
    ],
)
def test_one_malformed_item_spoils_the_accuracy(bad):
    assert acc(says(GOOD), [MUG, SPOON]) == 1.5
    assert (
        acc(says(bad))
        == acc(says(GOOD, bad), [MUG, SPOON])
        == acc(says(bad, GOOD), [MUG, SPOON])
        == 0
    )


def test_string_coordinates_pass_the_format_and_earn_no_accuracy():
    text = says('{"bbox_2d": ["100","200","300","400"], "point_2d": ["200","300"]}')
    assert vision_reasoner(text, [MUG]) == dict(format=3, non_repeat=1, accuracy=0)


def test_accuracy_does_not_ask_for_the_format():
    assert vision_reasoner(f"Well: <answer>[{GOOD}]</answer>", [MUG]) == dict(
        format=2, non_repeat=1, accuracy=3
    )


def test_empty_answers():
    assert vision_reasoner(says(), [MUG]) == dict(format=1, non_repeat=1, accuracy=0)
    assert acc(says(), []) == acc(says(GOOD), []) == 0
    assert vision_reasoner("", [MUG]) == dict(format=0, non_repeat=1, accuracy=0)


def test_too_many_and_too_few_cost_alike():
    assert acc(says(GOOD, GOOD)) == 1.5  # 3 of 3·2: a copy finds no partner
    assert acc(says(GOOD, GOOD, GOOD)) == 1
    assert acc(says(GOOD), [MUG, SPOON]) == 1.5


def test_matching_beats_greedy():
    # p1 has 2 points with a and with b, p2 has 2 with a and 0 with b
    # greedy p1–a leaves 2 + 0, the best is 2 + 2
    a, b = Target((0, 0, 99, 99), (0, 0)), Target((0, 9, 99, 108), (99, 108))
    p1, p2 = item((0, 5, 99, 104), (50, 50)), item((0, -9, 99, 90), (50, 40))
    assert [acc(says(p), [t]) for p in (p1, p2) for t in (a, b)] == [2, 2, 2, 2]
    p2 = item(
        (0, -30, 99, 69), (0, 0)
    )  # IoU 70/130 and the point right for a; IoU 61/139 < 1/2 for b
    assert [acc(says(p), [t]) for p in (p1, p2) for t in (a, b)] == [2, 2, 2, 0]
    assert acc(says(p1, p2), [a, b]) == acc(says(p2, p1), [a, b]) == acc(says(p1, p2), [b, a]) == 2


def test_at_most_120_objects_a_side():
    rest = item((700, 700, 710, 710), (705, 705))
    assert acc(says(*[GOOD] + [rest] * 119)) == 3 / 120
    assert acc(says(*[GOOD] + [rest] * 500)) == 3 / 120  # what is beyond does not divide
    assert acc(says(*[rest] * 120 + [GOOD])) == 0  # nor does it count
    assert acc(says(*[rest] * 500 + ["7"])) == 0
    assert acc(says(GOOD), [MUG] + [SPOON] * 500) == 3 / 120
    assert acc(says(GOOD), [SPOON] * 120 + [MUG]) == 0
    row = [Target((7 * i, 0, 7 * i + 5, 5), (7 * i + 2, 2)) for i in range(121)]
    assert acc(format_response("x", None, row), row) == 3  # 120 of 120


def test_thresholds_scale_with_the_frame():
    truth = Target((40, 40, 80, 80), (60, 60))

    def shifted(d):
        return says(item([v + d for v in truth.box], truth.point))

    def moved(d):
        return says(item(truth.box, (60 + d, 60)))

    assert acc(shifted(1), [truth], frame=112) == 3
    assert acc(shifted(2), [truth], frame=112) == 2  # 10·112/840 = 1.33
    assert acc(moved(3), [truth], frame=112) == 3
    assert acc(moved(4), [truth], frame=112) == 2  # 30·112/840 = 4, strict
    assert acc(shifted(9), [truth]) == 2
    assert acc(shifted(10), [truth]) == 1  # 840 when nothing is said; IoU 32²/2338 < 1/2
    assert acc(shifted(19), [truth], frame=1680) == 2
    assert acc(shifted(20), [truth], frame=1680) == 1  # the point is on the edge

    def wide(x):
        return says(item((40, 40, 400, 80), (x, 60)))

    assert acc(wide(119), [truth], frame=1680) == 1
    assert acc(wide(120), [truth], frame=1680) == 0  # 60 px


def test_targets_may_be_numpy():
    truth = Target(tuple(np.array(MUG.box)), tuple(np.array(MUG.point)))
    r = vision_reasoner(says(GOOD), [truth])
    assert r == dict(format=3, non_repeat=1, accuracy=3)
    assert type(r["accuracy"]) is float


# VisionReasoner: non-repeat


@pytest.mark.parametrize(
    "text, want",
    [
        ("One. Two. Three.", 1),
        ("One. One.", 1),  # one repeat is allowed
        ("One. One. One.", 0),  # two are not
        ("One. Two. One. Two.", 0),  # nor two of different pieces
        ("One.One.  One ", 0),  # pieces are stripped
        ("One. one. ONE.", 1),  # exactly
        ("One, One, One! One? One", 1),  # only the full stop splits
        ("........", 1),  # empties are dropped
        ("One\n. One.\tOne", 0),
        ("", 1),
    ],
)
def test_non_repeat(text, want):
    assert non_repeat(text) == vision_reasoner(text, [MUG])["non_repeat"] == want


def test_non_repeat_splits_the_whole_response():
    assert (
        non_repeat("<think>Red. Red. Red</think><answer>[]</answer>") == 1
    )  # '<think>Red', 'Red', 'Red</think>…': no two alike
    assert non_repeat("<think> . Red. Red. Red. </think><answer>[]</answer>") == 0
    floats = (
        '<think>x</think><answer>[{"bbox_2d": [1.0,2.0,3.0,4.0], "point_2d": [0.0,0.0]}]</answer>'
    )
    assert non_repeat(floats) == 1  # '0,2', '0,3', … differ
    assert (
        non_repeat("<answer>[1.5, 2.5, 1.5, 2.5, 1.5, 2.5]</answer>") == 0
    )  # '5, 2' and '5, 1' come again


# Seg-Zero

PAIR = Target(MUG.box, (150, 300), second=(250, 300))
ALL = dict(thinking_format=1, answer_format=1, iou=1, box=1, points=1)


def zero(box="[100,200,300,400]", one="[150,300]", two="[250,300]", target=(PAIR,), **kwargs):
    answer = f'{{"bbox": {box}, "points_1": {one}, "points_2": {two}}}'
    return seg_zero(
        f"<think>A mug.</think><answer>{answer}</answer>",
        list(target),
        **kwargs,
    )


def test_seg_zero_all_right():
    assert zero() == ALL
    assert zero(one="[250,300]", two="[150,300]") == ALL  # either pairing


@pytest.mark.parametrize(
    "box, one, two, wrong",
    [
        ("[100,200,300]", "[150,300]", "[250,300]", {"answer_format", "iou", "box", "points"}),
        ('"none"', "[150,300]", "[250,300]", {"answer_format", "iou", "box", "points"}),
        ("[100,200,300,400]", "[150]", "[250,300]", {"answer_format", "points"}),
        ("[100,200,300,400]", "[150,300]", "null", {"answer_format", "points"}),
        (
            '["100","200","300","400"]',
            "[150,300]",
            "[250,300]",
            {"iou", "box", "points"},
        ),  # the format looks at no types
        ("[100,200,300,NaN]", "[150,300]", "[250,300]", {"iou", "box", "points"}),
        ("[110,210,310,410]", "[150,300]", "[250,300]", {"box"}),  # exactly 10
        ("[110,210,310,409]", "[150,300]", "[250,300]", set()),
        ("[0,200,300,500]", "[150,300]", "[250,300]", {"iou", "box"}),  # 201² of 301²
        ("[100,200,300,400]", "[99,300]", "[250,300]", {"points"}),  # out of the predicted box
        ("[100,200,300,400]", "[100,300]", "[300,300]", set()),  # edges in
        (
            "[0,0,839,839]",
            "[150,400]",
            "[250,400]",
            {"iou", "box", "points"},
        ),  # mean distance exactly 100
        ("[0,0,839,839]", "[150,400]", "[250,399]", {"iou", "box"}),  # 99.5
        ("[0,0,839,839]", "[150,300]", "[250,499]", {"iou", "box"}),  # (0 + 199)/2
    ],
)
def test_seg_zero_by_hand(box, one, two, wrong):
    got = zero(box, one, two)
    assert {k for k, v in got.items() if not v} == wrong
    assert set(got) == set(ALL)
    assert set(got.values()) <= {0, 1}


def test_seg_zero_reads_the_first_braces_with_something_in_them():
    good = '{"bbox": [100,200,300,400], "points_1": [150,300], "points_2": [250,300]}'
    assert (
        seg_zero(f'<think>A {{}} mug.</think><answer>{good} {{"bbox": 1}}</answer>', [PAIR]) == ALL
    )
    assert sum(seg_zero(f"<think>A {{mug}}.</think><answer>{good}</answer>", [PAIR]).values()) == 1
    assert seg_zero(f"<think>A mug.</think><answer>[{good}]</answer>", [PAIR]) == ALL
    assert seg_zero(good, [PAIR]) == ALL | dict(thinking_format=0)
    assert sum(seg_zero("", [PAIR]).values()) == sum(seg_zero("{", [PAIR]).values()) == 0


def test_seg_zero_frame_caption_and_targets():
    assert zero("[101,201,301,401]", frame=84) == ALL | dict(box=0)
    assert zero("[100,200,301,401]", frame=84) == ALL  # 10·84/840 = 1
    assert zero(one="[150,310]", two="[250,310]", frame=84)["points"] == 0
    assert zero(one="[150,310]", two="[250,309]", frame=84)["points"] == 1
    text = "<think>a</think><answer>b</answer>"
    assert thinking_format(text + "\n<caption>c</caption>", CAPTIONED) == 1
    assert thinking_format(text, CAPTIONED) == 0
    assert (
        seg_zero("<think>a</think><caption>c</caption><answer>b</answer>", [PAIR], caption=True)[
            "thinking_format"
        ]
        == 0
    )  # the caption comes last
    assert zero(target=[MUG])["points"] == 1  # a single point serves twice: both are 50 off
    two = Target((100, 200, 200, 400), (150, 300)), Target((200, 200, 300, 300), (250, 300))
    assert zero(target=two) == ALL  # two objects as one
    assert zero(target=()) == ALL | dict(iou=0, box=0, points=0)


# PixelThink


@pytest.mark.parametrize(
    "used, difficulty, uncertainty, want",
    [
        (96, 0, 0, 1),
        (97, 0, 0, 1 - 1 / 500),
        (10, 0, 0, 1),
        (346, 3.4, 0.9, 0.5),
        (596, 3.49, 0, 0),
        (5000, 1, 0, 0),
        (5000, 3.5, 0, 1),
        (5000, 4.99, 1, 1),
        (256, 5, 0, 1),
        (506, 5, 0, 0.5),
        (756, 5, 0, 0),
        (281, 5, 1, 1),
        (531, 9, 1, 0.5),
        (518, 5, 0.48, 0.5),
    ],
)
def test_pixelthink(used, difficulty, uncertainty, want):
    close(length_factor(used, difficulty, uncertainty), float(want))


def test_pixelthink_broadcasts():
    out = length_factor(torch.full((2, 1), 346), [[3.0, 4, 5]], 0.0)
    close(out, [[0.5, 1, 1 - 90 / 500]] * 2)


# DR2Seg


def test_description_reward_by_hand():
    def second(*targets):
        return format_response("So it is.", None, targets)

    near = Target((110, 210, 310, 410), (0, 0))
    assert description_reward(second(near), [MUG]) == 1  # the point does not matter, nor do 10 px
    assert description_reward(second(SPOON), [MUG]) == 0
    assert description_reward(second(near, SPOON), [SPOON, MUG]) == 1  # order does not matter
    assert description_reward(second(near), [MUG, SPOON]) == 0  # counts
    assert description_reward(second(near, SPOON), [MUG]) == 0
    assert description_reward(second(near, near), [MUG, SPOON]) == 0  # every pair, not one
    assert description_reward(second(near, near), [MUG, MUG]) == 1


@pytest.mark.parametrize("width, want", [(5, 0), (6, 1)])
def test_description_reward_is_strict(width, want):
    text = says(item((0, 0, width - 1, 9), (0, 0)))
    assert description_reward(text, [Target((0, 0, 9, 9), (5, 5))]) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<answer>",
        "<answer>[]</answer>",
        f"<answer>[{GOOD}, 7]</answer>",
        f"<answer>{GOOD}</answer>",
        '<answer>[{"bbox_2d": [100,200,300,400]}]</answer>',
    ],
)
def test_description_reward_of_a_malformed_answer(text):
    assert description_reward(text, [MUG]) == 0


def test_description_reward_without_targets():
    assert description_reward("<think>Nothing there.</think><answer>[]</answer>", []) == 1
    assert (
        description_reward("<think>Nothing there.</think><answer>none</answer>", [])
        == description_reward("", [])
        == description_reward(says(GOOD), [])
        == 0
    )


def test_description_reward_finds_the_matching_that_serves_all():
    # p1 is right for both, p2 for a only; by greatest total IoU p1–b would not be forced
    a, b = Target((0, 0, 99, 99), ()), Target((0, 20, 99, 119), ())
    p1, p2 = Target((0, 5, 99, 104), (0, 0)), Target((0, -20, 99, 79), (0, 0))
    assert [boxes_overlap(p, t) for p in (p1, p2) for t in (a, b)] == [True, True, True, False]
    assert (
        description_reward(format_response("x", None, [p1, p2]), [a, b])
        == description_reward(format_response("x", None, [p2, p1]), [a, b])
        == 1
    )


@pytest.mark.parametrize(
    "n1, n2, want",
    [
        (30, 29, 1),
        (30, 30, 0),
        (30, 31, 0),  # N2 < N1, strictly
        (40, 0, 1),
        (41, 0, 0.95),
        (45, 0, 0.75),
        (50, 0, 0.5),  # from the anchor on 0.05 a token
        (59, 0, 0.05),
        (60, 0, 0),
        (61, 0, 0),
        (500, 0, 0),  # clipped at 0
        (0, 0, 0),
        (500, 600, 0),
        (30, float("inf"), 0),
        (30, float("nan"), 0),  # no description: no second pass
    ],
)
def test_length_reward_eq5(n1, n2, want):
    close(length_reward(n1, n2), float(want))


def test_length_reward_settings_of_the_ablation():
    close(length_reward(50, 20, anchor=45), 0.75)
    close(length_reward(50, 20, gamma=0.01), 0.9)
    close(length_reward(50, 20, gamma=0.2), 0.0)
    close(length_reward(50, 20, anchor=30, gamma=0.05), 0.0)
    close(length_reward(10_000, 20, gamma=0), 1.0)


def test_length_reward_broadcasts():
    out = length_reward(torch.tensor([[30], [50]]), torch.tensor([10, 40, 60]))
    close(out, [[1, 0, 0], [0.5, 0.5, 0]])
    assert length_reward([1, 2], 0).shape == (2,)
    assert length_reward(1, 0).shape == ()
    assert length_reward(torch.tensor([30.0, 50], dtype=torch.float64), 1).dtype == torch.float64


def test_conditional_length_eq8():
    r_len = torch.tensor([[0.5, 0, 1], [0.5, 0, 1], [0.5, 0, 1]])
    r_acc = torch.tensor([[0, 0, 0.1], [0, 0, 0], [3, 3, 3]])
    close(
        conditional_length(r_len, r_acc), [[0.5, 0, 1], [1, 1, 1], [0.5, 0, 1]]
    )  # nobody right: 1 for all
    close(conditional_length([0.5, 0], [0, 0]), [1, 1])
    close(conditional_length([0.5, 0], [0, 1]), [0.5, 0])
    assert conditional_length(torch.rand(2, 3, 8), torch.zeros(2, 3, 8)).shape == (2, 3, 8)


def test_total_reward_eq7():
    close(total_reward(7, 1, 1), 8.0)
    close(total_reward([7, 4], [1, 0], [0.5, 1]), [4, 4])
    close(total_reward(torch.tensor([[7.0], [3.0]]), 1, torch.tensor([0, 0.5])), [[0, 4], [0, 2]])


# DPAD


@pytest.mark.parametrize(
    "variant, want",
    [("binary", [1, 0, 0]), ("difference", [0.1, 0, -0.1]), ("scaled", [0.03, 0, 0])],
)
def test_discriminative(variant, want):
    close(discriminative([0.3, 0.25, 0.2], [0.2, 0.25, 0.3], variant=variant), want)
    close(
        discriminative([0.3, 0.25, 0.2], [0.2, 0.25, 0.3], variant=variant, tokens=[78] * 3),
        [0, 0, 0],
    )
    close(discriminative(0.3, 0.2, variant=variant, tokens=77), want[0] * 1.0)


def test_scaled_of_negative_cosines():
    close(discriminative([-0.1, -0.2], [-0.2, -0.1], variant="scaled"), [-0.01, 0])


def test_discriminative_unknown_variant():
    with pytest.raises(ValueError, match="'ratio'.*'binary', 'difference' or 'scaled'"):
        discriminative(0.3, 0.2, variant="ratio")
    close(discriminative(0.3, 0.2), 1.0)


# Properties

coordinate = st.integers(-20, 900)
objects = st.lists(
    st.tuples(st.tuples(*[coordinate] * 4), st.tuples(*[coordinate] * 2)).map(lambda t: Target(*t)),
    max_size=5,
)
near = st.lists(
    st.tuples(st.tuples(*[st.integers(0, 12)] * 4), st.tuples(*[st.integers(0, 12)] * 2)).map(
        lambda t: Target(*t)
    ),
    min_size=1,
    max_size=4,
)
anything = (
    st.text()
    | soup
    | objects.map(lambda o: format_response("x", None, o))
    | st.text(max_size=20).map(says)
)


def in_range(r):
    return 0 <= r["format"] <= 3 and r["non_repeat"] in (0, 1) and 0 <= r["accuracy"] <= 3


@given(anything, objects, st.booleans())
def test_any_text_is_scored_within_range(text, target, description):
    assert in_range(vision_reasoner(text, target, description=description))
    assert description_reward(text, target) in (0, 1)
    assert set(seg_zero(text, target).values()) <= {0, 1}
    assert set(seg_zero(text, target, caption=True).values()) <= {0, 1}


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["bbox_2d", "point_2d", "bbox", "points_1", "points_2"]),
                inner,
                max_size=5,
            )
        ),
    )
)
def test_any_json_is_scored_within_range(data):
    text = f"<think>x</think><answer>{json.dumps(data)}</answer>"
    assert in_range(vision_reasoner(text, [MUG]))
    assert set(seg_zero(text, [PAIR]).values()) <= {0, 1}
    assert description_reward(text, [MUG]) in (0, 1)


@given(near, near, st.randoms())
def test_the_order_of_objects_does_not_matter(predicted, target, random):
    def score(p, t):
        return (
            vision_reasoner(format_response("x", None, p), t, frame=112),
            description_reward(format_response("x", None, p), t),
        )

    p, t = random.sample(predicted, len(predicted)), random.sample(target, len(target))
    assert score(p, t) == score(predicted, target)


@given(near, near)
def test_accuracy_against_numpy_and_all_matchings(predicted, target):
    frame = 112
    p, t = (
        [np.array([getattr(o, name) for o in side], float) for name in ("box", "point")]
        for side in (predicted, target)
    )
    corners = abs(p[0][:, None] - t[0][None]).mean(-1) < 10 * frame / 840
    points = (np.linalg.norm(p[1][:, None] - t[1][None], axis=-1) < 30 * frame / 840) & (
        (p[1] >= p[0][:, :2]) & (p[1] <= p[0][:, 2:])
    ).all(-1)[:, None]
    scores = (box_iou(p[0], t[0]) > 0.5).astype(int) + corners + points
    if len(predicted) > len(target):
        scores = scores.T
    best = max(
        sum(scores[i, j] for i, j in enumerate(cols))
        for cols in permutations(range(scores.shape[1]), scores.shape[0])
    )
    assert accuracy(predicted, target, frame) == pytest.approx(
        best / max(len(predicted), len(target))
    )


@given(near)
def test_saying_the_truth_is_right(target):
    text = format_response("x", None, target)
    well = [t for t in target if t.box[0] <= t.box[2] and t.box[1] <= t.box[3]]
    assert acc(text, target) >= 1
    assert len(well) < len(target) or description_reward(text, target) == 1


@given(st.integers(0, 3000), st.integers(0, 3000), st.integers(0, 200), st.floats(0, 1))
def test_length_reward_range_and_monotonicity(n1, n2, anchor, gamma):
    r = length_reward([n1, n1 + 1], n2, anchor, gamma)
    assert ((0 <= r) & (r <= 1)).all()
    if n2 < n1:
        assert r[1] <= r[0]  # longer never pays once the second pass is the shorter
    if n2 >= n1:
        assert r[0] == 0
    assert length_reward(n1, n2 + 1, anchor, gamma) <= r[0]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 3)), min_size=1, max_size=8))
def test_conditional_length_never_takes(group):
    r_len, r_acc = torch.tensor(group).T
    out = conditional_length(r_len, r_acc)
    assert (out >= r_len).all()
    assert (out == (r_len if (r_acc > 0).any() else torch.ones_like(r_len))).all()


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=3))
def test_matched_is_the_best_of_all_matchings(scores):
    assert best_matching(scores) == max(
        sum(row[c] for row, c in zip(scores, cols)) for cols in permutations(range(3), len(scores))
    )


# Hostile text


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + "</think><description></description><answer>" * 50_000 + "</answer>",
        "<think>" * 100_000,
        "</think>" * 100_000 + "</answer>",
        "<think>a</think><answer>" + "[" * 200_000 + "</answer>",
        says(*[GOOD] * 20_000),
        "{" * 500_000,
        "{}" * 200_000,
        "{" * 200_000 + "}",
        "." * 1_000_000,
        "a." * 500_000,
        "<think>x</think>" + " " * 500_000 + "y<answer>",
        says('{"bbox_2d": [' + "9" * 100_000 + ',1,1,1], "point_2d": [1,1]}'),
        '<think>x</think><answer>{"bbox": [1e999,-1e999,NaN,9'
        + "9" * 4000
        + '], "points_1": [1,1], "points_2": [1,1]}</answer>',
        "\x00\ud800" * 1000,
    ],
)
def test_hostile_text_neither_raises_nor_hangs(text):
    start = process_time()
    assert in_range(vision_reasoner(text, [MUG]))
    assert in_range(vision_reasoner(text, [MUG] * 200, description=True))
    assert set(seg_zero(text, [PAIR]).values()) <= {0, 1}
    assert description_reward(text, [MUG]) in (
        0,
        1,
    )
    assert process_time() - start < 10


def test_written_answers_keep_their_score():
    assert (
        acc(format_response("x", "y", parse_answer(format_answer([MUG, SPOON]))), [SPOON, MUG]) == 3
    )
