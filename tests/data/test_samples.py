"Samples: scaling by hand, unions, and what does not change."

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dr2seg_lib.data.samples import Sample, Target


def region(h, w, x1, y1, x2, y2):
    mask = np.zeros((h, w), bool)
    mask[y1 : y2 + 1, x1 : x2 + 1] = True
    return mask


def sample(w, h, *targets, **kwargs):
    return Sample("s", np.zeros((h, w, 3), np.uint8), "q", targets, **kwargs)


def test_target_of_a_mask():
    mask = region(60, 100, 5, 10, 25, 40)
    t = Target.of(mask)
    assert (t.box, t.point) == ((5, 10, 25, 40), (15, 20))
    assert t.mask is mask
    with pytest.raises(ValueError, match="empty"):
        Target.of(mask & False)


def test_size_is_width_first():
    assert sample(100, 60).size == (100, 60)


def test_scaling_is_per_axis():
    t = Target((5, 10, 25, 40), (15, 20), region(60, 100, 5, 10, 25, 40))
    (one,) = sample(100, 60, t).scaled(840)
    assert (one.box, one.point, one.mask) == ((42, 140, 210, 560), (126, 280), None)


@pytest.mark.parametrize(
    "v, side, frame, want",
    [
        (1, 1680, 840, 1),  # 0.5 rounds up
        (1, 1681, 840, 0),  # 0.4997
        (3, 1680, 840, 2),  # 1.5 rounds up
        (479, 480, 840, 838),  # 838.25
        (111, 112, 112, 111),  # its own frame changes nothing
        (0, 640, 840, 0),
    ],
)
def test_rounding_half_up(v, side, frame, want):
    (one,) = sample(side, 7, Target((v, 0, v, 0), (v, 0))).scaled(frame)
    assert one.box == (want, 0, want, 0)
    assert one.point == (want, 0)
    assert type(one.box[0]) is int


@given(st.integers(1, 4000), st.integers(1, 2000), st.data())
def test_scaling_follows_the_written_rule(side, frame, data):
    v = data.draw(st.integers(0, side - 1))
    (one,) = sample(side, 2, Target((v, 0, v, 1), (v, 1))).scaled(frame)
    assert one.point[0] == int(v * frame / side + 0.5)
    assert 0 <= one.point[0] <= frame


def test_mask_is_the_union():
    a, b = region(8, 9, 0, 0, 3, 3), region(8, 9, 2, 2, 5, 5)
    s = sample(9, 8, Target.of(a), Target.of(b))
    assert np.array_equal(s.mask, a | b)
    assert a.sum() == 16


def test_targets_without_masks_are_told():
    s = sample(9, 8, Target((0, 0, 1, 1), (0, 0)))
    problem = "sample s: its targets are boxes and points without masks"
    with pytest.raises(ValueError, match=f"{problem}; evaluate on a data set that has masks."):
        _ = s.mask
    assert len(s.scaled(840)) == 1


def test_no_targets():
    s = sample(9, 8)
    assert s.mask.shape == (8, 9)
    assert s.mask.dtype == bool
    assert not s.mask.any()
    assert s.scaled(840) == []


def test_defaults_are_not_shared():
    assert sample(2, 2).tags == {}
    assert sample(2, 2).tags is not sample(2, 2).tags
    assert sample(2, 2).ignore is None


def test_frozen_and_compared_by_identity():
    t = Target((0, 0, 1, 1), (0, 0), np.ones((2, 2), bool))
    with pytest.raises(dataclasses.FrozenInstanceError):
        t.box = (1, 1, 2, 2)
    assert t == t
    assert t != Target((0, 0, 1, 1), (0, 0), np.ones((2, 2), bool))
    assert len({t, t}) == 1
