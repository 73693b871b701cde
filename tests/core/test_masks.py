"Masks: exact round trips, boxes and points by hand, overlaps by counting."

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco

from dr2seg_lib.core.masks import (
    box_iou,
    decode_rle,
    deepest_point,
    encode_rle,
    inscribed_circle,
    iou,
    mask_box,
    ratio,
    second_deepest_point,
)

masks = arrays(bool, st.tuples(st.integers(1, 24), st.integers(1, 24)))
coordinate = st.integers(-50, 50)


def region(h, w, x1, y1, x2, y2):
    mask = np.zeros((h, w), bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


@given(masks)
def test_rle_round_trip_through_json(mask):
    rle = json.loads(json.dumps(encode_rle(mask)))
    assert rle["size"] == list(mask.shape)
    assert isinstance(rle["counts"], str)
    back = decode_rle(rle)
    assert back.dtype == bool
    assert np.array_equal(back, mask)


@given(masks)
def test_decoding_is_cocos(mask):
    rle = coco.encode(np.asfortranarray(mask, np.uint8))  # counts are bytes
    assert np.array_equal(decode_rle(rle), coco.decode(rle).astype(bool))
    assert np.array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize("h, w", [(1, 1), (480, 640), (2000, 3), (3, 2000)])
def test_long_runs_are_decoded(h, w):
    for mask in (
        np.zeros((h, w), bool),
        np.ones((h, w), bool),
        np.random.default_rng(0).random((h, w)) > 0.5,
        np.arange(h * w).reshape(h, w) > h * w // 2,
    ):
        assert np.array_equal(decode_rle(encode_rle(mask)), mask)


GOOD = encode_rle(np.eye(5, 4, dtype=bool))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        [],
        {},
        "x",
        5,
        dict(size=[5, 4]),
        dict(counts=GOOD["counts"]),
        GOOD | dict(size=[4, 4]),
        GOOD | dict(size=[5]),
        GOOD | dict(size="54"),
        GOOD | dict(size=[5, -4]),
        GOOD | dict(size=[5.0, 4]),
        GOOD | dict(size=[10**6, 10**6]),
        GOOD | dict(size=[10**6, 10**6], counts=[10**12]),
        GOOD | dict(counts=""),
        GOOD | dict(counts="é"),
        GOOD | dict(counts="~"),
        GOOD | dict(counts="0" + "o" * 40 + "1"),
        GOOD | dict(counts="P" * 12 + "0"),
        GOOD | dict(counts=[21, -1]),
        GOOD | dict(counts=[20.0]),
        GOOD | dict(counts=[True] * 20),
        GOOD | dict(counts=5),
        GOOD | dict(counts=b"\xff"),
    ],
)
def test_counts_are_not_believed(bad):
    with pytest.raises(ValueError, match="; "):
        decode_rle(bad)


@given(st.text(st.characters(min_codepoint=40, max_codepoint=127), max_size=30))
def test_any_counts_are_a_mask_or_refused(counts):
    try:
        assert decode_rle(dict(size=[5, 4], counts=counts)).shape == (5, 4)
    except ValueError:
        pass


def test_rle_takes_any_memory_layout():
    mask = region(9, 14, 3, 2, 8, 5)
    assert (
        encode_rle(mask)
        == encode_rle(np.asfortranarray(mask))
        == encode_rle(mask.T.copy().T)
        == encode_rle(np.repeat(mask, 2, axis=1)[:, ::2])
    )
    assert encode_rle(mask.astype(np.uint8)) == encode_rle(mask)


def test_rle_wants_two_axes():
    with pytest.raises(ValueError, match=r"\[H,W\].*\(3, 4, 1\)"):
        encode_rle(np.zeros((3, 4, 1), bool))


def test_box_is_inclusive():
    assert mask_box(region(20, 30, 4, 7, 11, 9)) == (4, 7, 11, 9)
    assert mask_box(region(20, 30, 29, 19, 29, 19)) == (29, 19, 29, 19)


def test_box_and_point_are_plain_ints():
    mask = region(20, 30, 4, 7, 11, 9)
    assert all(type(v) is int for v in (*mask_box(mask), *deepest_point(mask)))


@pytest.mark.parametrize(
    "mask, point",
    [
        (region(20, 30, 10, 5, 14, 9), (12, 7)),  # the middle of a 5×5 square
        (region(20, 30, 10, 5, 10, 5), (10, 5)),  # a single pixel
        (
            np.ones((7, 5), bool),
            (2, 2),
        ),  # beyond the border is background; of equals, the first in reading order
        (
            region(20, 30, 0, 0, 4, 4),
            (2, 2),
        ),  # cut off by a corner: still its middle, not the corner
    ],
)
def test_point_by_hand(mask, point):
    assert deepest_point(mask) == point


def test_point_of_a_ring_is_on_the_ring():
    y, x = np.mgrid[:50, :50]
    r = np.hypot(x - 25, y - 25)
    ring = (r < 20) & (r > 10)
    px, py = deepest_point(ring)
    assert ring[py, px]
    assert 14 <= r[py, px] <= 16


@given(masks.filter(np.any))
def test_point_is_as_deep_as_any_pixel(mask):
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    x, y = deepest_point(mask)
    x1, y1, x2, y2 = mask_box(mask)
    assert mask[y, x]
    assert depth[y, x] == depth.max()
    assert x1 <= x <= x2
    assert y1 <= y <= y2


def circle_plainly(mask):
    "By scipy, over the whole mask."
    from scipy.ndimage import distance_transform_edt

    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return (x, y), depth[y, x]


@given(masks.filter(np.any))
def test_the_largest_circle_is_scipys(mask):
    assert inscribed_circle(mask) == circle_plainly(mask)


@pytest.mark.parametrize("h, w", [(700, 900), (1900, 2046), (2050, 300), (2046, 2046)])
def test_the_largest_circle_of_large_masks(h, w):
    "On both sides of the size from which scipy computes."
    waves = np.add.outer(
        np.sin(np.arange(h) / 97) + np.cos(np.arange(h) / 41),
        np.sin(np.arange(w) / 83) + np.cos(np.arange(w) / 59),
    )
    for mask in waves > 0.1, waves > -1.5, np.ones((h, w), bool):
        assert inscribed_circle(mask) == circle_plainly(mask)


@given(masks.filter(np.any))
def test_the_second_point_by_the_rule(mask):
    (x, y), radius = circle_plainly(mask)
    Y, X = np.indices(mask.shape)
    rest = mask & ((X - x) ** 2 + (Y - y) ** 2 >= round(radius**2))
    assert second_deepest_point(mask) == (circle_plainly(rest)[0] if rest.any() else (x, y))


@pytest.mark.parametrize("f", [mask_box, deepest_point])
def test_empty_mask_has_neither(f):
    with pytest.raises(ValueError, match="empty mask"):
        f(np.zeros((4, 4), bool))


def test_iou_counts():
    a, b = region(10, 10, 0, 0, 3, 3), region(10, 10, 2, 2, 5, 5)  # 16 and 16 pixels, 4 shared
    assert iou(a, b) == (4, 28)
    assert ratio(*iou(a, b)) == 4 / 28
    assert iou(a, b, ignore=region(10, 10, 2, 2, 2, 2)) == (3, 27)  # one of the shared
    assert iou(a, b, ignore=region(10, 10, 0, 0, 0, 0)) == (4, 27)  # one of a's own
    assert all(type(v) is int for v in iou(a, b))


def test_union_zero_is_right():
    nothing = np.zeros((5, 5), bool)
    assert iou(nothing, nothing) == (0, 0)
    assert ratio(0, 0) == 1.0
    assert ratio(*iou(nothing, region(5, 5, 0, 0, 1, 1))) == 0.0
    full = ~nothing
    assert ratio(*iou(full, nothing, ignore=full)) == 1.0


def test_iou_wants_one_size():
    with pytest.raises(ValueError, match="one size"):
        iou(np.zeros((5, 5), bool), np.zeros((1, 5), bool))


def test_iou_leaves_its_arguments_alone():
    a, b, ignore = np.ones((4, 4), bool), np.ones((4, 4), bool), np.ones((4, 4), bool)
    iou(a, b, ignore)
    assert a.all()
    assert b.all()
    assert ignore.all()


@pytest.mark.parametrize(
    "a, b, want",
    [
        ([0, 0, 9, 9], [0, 0, 4, 9], 50 / 100),
        ([0, 0, 9, 9], [5, 0, 14, 9], 50 / 150),
        ([0, 0, 9, 9], [9, 9, 18, 18], 1 / 199),  # boxes are inclusive: these share one pixel
        ([0, 0, 9, 9], [10, 0, 19, 9], 0),
        ([3, 3, 3, 3], [3, 3, 3, 3], 1),
        ([9, 9, 0, 0], [9, 9, 0, 0], 0),  # inside out
        ([9, 0, 0, 9], [0, 0, 9, 9], 0),
    ],
)
def test_box_iou_by_hand(a, b, want):
    assert box_iou([a], [b])[0, 0] == pytest.approx(want) == box_iou([b], [a])[0, 0]


def test_box_iou_shapes():
    assert box_iou(np.zeros((3, 4)), np.zeros((5, 4))).shape == (3, 5)
    assert box_iou([], [[0, 0, 1, 1]]).shape == (0, 1)


@given(
    *[st.tuples(st.integers(0, 15), st.integers(0, 15), st.integers(0, 4), st.integers(0, 4))] * 2
)
def test_box_iou_is_the_iou_of_the_filled_boxes(a, b):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    a, b = (ax, ay, ax + aw, ay + ah), (bx, by, bx + bw, by + bh)
    assert box_iou([a], [b])[0, 0] == pytest.approx(
        ratio(*iou(region(20, 20, *a), region(20, 20, *b)))
    )


@given(
    st.lists(st.tuples(*[coordinate] * 4), max_size=5),
    st.lists(st.tuples(*[coordinate] * 4), max_size=5),
)
def test_box_iou_of_anything_is_a_ratio(a, b):
    out = box_iou(a, b)
    assert out.shape == (len(a), len(b))
    assert ((0 <= out) & (out <= 1)).all()
    assert np.allclose(out, box_iou(b, a).T)


def test_second_point_is_the_centre_of_the_next_circle():
    mask = np.zeros((30, 60), bool)
    mask[5:26, 5:26] = True  # a large square
    mask[10:19, 40:49] = True  # a small one, apart
    assert deepest_point(mask) == (15, 15)
    assert second_deepest_point(mask) == (44, 14)
    assert second_deepest_point(np.eye(1, dtype=bool)) == (0, 0)
