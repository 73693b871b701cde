"The world is exact, deterministic and fair."

import numpy as np
import pytest

from dr2seg_lib.core.masks import deepest_point, mask_box
from dr2seg_lib.data.chains import think_concise, think_direct, think_verbose
from dr2seg_lib.data.mini import SPLIT_SEEDS, WARM_START, MiniReasonSeg, draw_problem
from dr2seg_lib.data.questions import KINDS
from dr2seg_lib.data.scenes import describe_objects, short_name

PUZZLES = [draw_problem(i) for i in range(300)]


def test_same_seed_same_sample():
    a, b = draw_problem(5).sample("x"), draw_problem(5).sample("x")
    assert np.array_equal(a.image, b.image)
    assert a.query == b.query
    assert a.tags == b.tags
    assert [t.box for t in a.targets] == [t.box for t in b.targets]


def test_split_ranges_do_not_meet():
    ranges = sorted(
        [(first, first + n) for first, n in SPLIT_SEEDS.values()]
        + [(WARM_START, WARM_START + 10**6)]
    )
    assert all(a[1] <= b[0] for a, b in zip(ranges, ranges[1:]))


def test_every_kind_occurs_and_no_question_names_its_target():
    assert {p.kind for p in PUZZLES} == set(KINDS)
    for p in PUZZLES:
        assert not any(short_name(t, p.scene) in p.question.text for t in p.question.targets), (
            p.question.text
        )


def test_names_are_unique_in_their_scene():
    for p in PUZZLES:
        names = [short_name(t, p.scene) for t in p.scene.things]
        assert len(set(names)) == len(names)


def test_masks_are_exact_and_apart():
    for p in PUZZLES[:40]:
        sample, masks = p.sample("x"), p.scene.masks()
        assert np.sum(masks, 0).max() == 1
        for t in sample.targets:
            assert t.box == mask_box(t.mask)
            assert t.point == deepest_point(t.mask)
            assert t.mask[t.point[1], t.point[0]]
        assert sample.mask.sum() == sum(t.mask.sum() for t in sample.targets)


def test_things_stay_in_the_picture():
    for p in PUZZLES[:60]:
        for m in p.scene.masks():
            assert not (m[0].any() or m[-1].any() or m[:, 0].any() or m[:, -1].any())


def test_edge_questions_have_the_answer_they_claim():
    for p in (p for p in PUZZLES if p.kind == "edge"):
        reason, t = p.question.reason[0], p.question.targets[0]
        key = {
            "left": lambda t: t.x,
            "right": lambda t: -t.x,
            "top": lambda t: t.y,
            "bottom": lambda t: -t.y,
        }[reason.split()[-1]]
        assert t is min(p.scene.things, key=key)


def test_colour_questions_have_one_answer():
    for p in (p for p in PUZZLES if p.kind in ("colour", "same_colour", "all_colour")):
        colour = p.question.targets[0].colour
        expected = {"colour": 1, "same_colour": 2, "all_colour": 2}[p.kind]
        assert sum(t.colour == colour for t in p.scene.things) == expected


def test_chains_end_on_the_targets():
    rng = np.random.default_rng(0)
    for p in PUZZLES:
        for think in (think_concise, think_verbose):
            assert think(rng, p.scene, p.question).endswith(
                f"{describe_objects(p.question.targets, p.scene)}."
            )
        direct = think_direct(p.question.targets)
        assert p.question.targets[-1].place in direct
        assert len(direct.split()) < len(think_concise(rng, p.scene, p.question).split())


def test_sequence_protocol():
    data = MiniReasonSeg("test", limit=3)
    assert len(data) == 3
    assert [s.id for s in data] == [data[i].id for i in range(3)]
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(ValueError, match="no split 'dev'"):
        MiniReasonSeg("dev")
