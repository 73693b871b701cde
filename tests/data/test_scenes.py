"The world is exact, deterministic and fair."

import numpy as np
import pytest

from dr2seg_lib.core.masks import deepest_point, mask_box
from dr2seg_lib.data.chains import (
    BLIND_SPOT,
    CARRIED,
    GO_ON,
    MISLEADING,
    STRAYED,
    TOUR,
    UNTEMPTED,
    think_again,
    think_aloud,
    think_concise,
    think_direct,
)
from dr2seg_lib.data.mini import SPLIT_SEEDS, WARM_START, MiniReasonSeg, draw_problem
from dr2seg_lib.data.questions import KINDS, find_odd
from dr2seg_lib.data.scene_facts import left_to_right, ruler_mark
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


def test_concise_chains_end_on_the_targets():
    rng = np.random.default_rng(0)
    for p in PUZZLES:
        concise = think_concise(rng, p.scene, p.question)
        direct = think_direct(p.question.targets)
        assert concise.endswith(f"{describe_objects(left_to_right(p.question.targets), p.scene)}.")
        assert p.question.targets[-1].place in direct
        assert len(direct.split()) < len(concise.split())


def test_facts_are_named_before_objects_are_compared():
    for p in (p for p in PUZZLES if p.kind in ("odd", "pair_colour", "pair_shape")):
        names = p.question.reason[0].removeprefix("from left to right they are ").split(", ")
        expected = [f"{ruler_mark(t)} {short_name(t, p.scene)}" for t in p.scene.things]
        assert sorted(names) == sorted(expected)
        assert [int(name.split()[0]) for name in names] == sorted(map(ruler_mark, p.scene.things))


def demonstrations(n):
    "Problems with their demonstrations, and how many second thoughts each has."
    rng, rows = np.random.default_rng(0), []
    for p in PUZZLES * n:
        chain = think_aloud(rng, p.scene, p.question)
        rows.append((p, chain, chain.text.count("wait,")))
    return rows


def test_a_demonstration_ends_on_the_objects_it_keeps():
    for p, chain, _ in demonstrations(1):
        assert chain.text.endswith(f"{describe_objects(chain.targets, p.scene)}.")
        assert len(chain.targets) == len(p.question.targets)


def test_without_second_thoughts_a_demonstration_is_right():
    chains = [(p, chain) for p, chain, thoughts in demonstrations(1) if thoughts == 0]
    assert len(chains) > 20
    assert all(set(c.targets) == set(p.question.targets) for p, c in chains)


def test_the_more_second_thoughts_the_fewer_demonstrations_are_right():
    rows = demonstrations(10)
    shares = []
    for n in range(len(GO_ON)):
        right = [set(c.targets) == set(p.question.targets) for p, c, k in rows if k == n]
        shares.append(np.mean(right))
    assert shares[0] == 1
    assert shares[0] - shares[1] > 0.1
    assert shares[1] - np.mean(shares[3:]) > 0.03


def test_second_thoughts_mislead_at_the_stated_rates():
    rng, begun, changed = np.random.default_rng(0), {}, {True: [], False: []}
    for p in PUZZLES * 40:
        held = left_to_right(p.question.targets)
        (doubt, _), after = think_again(rng, p.scene, held)
        misleads = "on second thought" in doubt
        begun.setdefault(held[0].colour in ("red", "purple"), []).append(misleads)
        changed[misleads].append(after != held)
    assert abs(np.mean(begun[True]) - BLIND_SPOT["red"]) < 0.03
    assert abs(np.mean(begun[False]) - MISLEADING) < 0.03
    for misleads, rate in ((True, CARRIED), (False, STRAYED)):
        assert abs(np.mean(changed[misleads]) - rate) < 0.03


def shares_colour_or_shape(p):
    first = left_to_right(p.question.targets)[0]
    others = [t for t in p.scene.things if t not in p.question.targets]
    return any(t.colour == first.colour or t.shape == first.shape for t in others)


def test_a_first_second_thought_is_rarer_where_nothing_is_like_the_answer():
    rows = demonstrations(20)
    for alike, rate in ((True, GO_ON[0]), (False, UNTEMPTED)):
        doubted = [n > 0 for p, _, n in rows if shares_colour_or_shape(p) is alike]
        assert len(doubted) > 1000 and abs(np.mean(doubted) - rate) < 0.03


def test_which_questions_are_met_with_a_look_around():
    rows = demonstrations(20)
    for word in ("which", "what"):
        looked = ["there is a" in c.text for p, c, _ in rows if p.question.text.startswith(word)]
        assert abs(np.mean(looked) - TOUR[word]) < 0.03


def test_lengths_of_demonstrations_are_one_heap():
    words = [len(chain.text.replace(".", " .").split()) for _, chain, _ in demonstrations(10)]
    counts, _ = np.histogram(words, bins=range(0, 180, 15))
    top = counts.argmax()
    assert (np.diff(counts[: top + 1]) > 0).all()
    assert (np.diff(counts[top:]) < 0).all()


def test_an_odd_one_out_is_the_only_one():
    seeds = range(3000)
    problems = [p for p in map(draw_problem, seeds) if p.kind == "odd"]
    for p in problems:
        odd = {find_odd(p.scene, feature)[0] for feature in ("colour", "shape")} - {None}
        assert odd == set(p.question.targets)


def test_sequence_protocol():
    data = MiniReasonSeg("test", limit=3)
    assert len(data) == 3
    assert [s.id for s in data] == [data[i].id for i in range(3)]
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(ValueError, match="no split 'dev'"):
        MiniReasonSeg("dev")
