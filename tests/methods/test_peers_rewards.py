"Rewards against the published rules, written again in the plainest way: spoiled answers."

import json
import random
import re
from itertools import permutations
from math import sqrt

import numpy as np
import pytest

from dr2seg_lib.data.samples import Sample, Target
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.rollouts.response import Group, Response

SEED, ANSWERS, FRAME = 20261122, 5000, 840
PICTURE = np.zeros((FRAME, FRAME, 3), np.uint8)


def found(pattern, text):
    match = re.search(pattern, text, re.DOTALL)
    return match and match.group(1)


def number(v):
    return type(v) in (int, float)


# ---- VisionReasoner: docs/methods.md §3, in loops


def overlap(a, b):
    "IoU of boxes whose corners are pixels of them."

    def area(x1, y1, x2, y2):
        return (x2 - x1 + 1) * (y2 - y1 + 1)

    w = min(a[2], b[2]) - max(a[0], b[0]) + 1
    h = min(a[3], b[3]) - max(a[1], b[1]) + 1
    shared = w * h if w > 0 and h > 0 else 0
    return shared / (area(*a) + area(*b) - shared) if shared else 0.0


def pair_worth(box, point, target):
    "0 to 3: overlap, corners, point."
    worth = int(overlap(box, target.box) > 0.5)
    worth += int(sum(abs(p - q) for p, q in zip(box, target.box)) / 4 < 10)
    away = sqrt((point[0] - target.point[0]) ** 2 + (point[1] - target.point[1]) ** 2)
    inside = box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]
    return worth + int(away < 30 and inside)


def best_matching(worth):
    "The greatest sum over one-to-one matchings, all of which are tried."
    if len(worth) > len(worth[0]):
        worth = [list(column) for column in zip(*worth)]
    places = range(len(worth[0]))
    return max(
        sum(row[c] for row, c in zip(worth, chosen)) for chosen in permutations(places, len(worth))
    )


def listed_accuracy(items, targets):
    if not isinstance(items, list) or not items:
        return 0.0
    for item in items:
        if not isinstance(item, dict):
            return 0.0
        for key, n in ("bbox_2d", 4), ("point_2d", 2):
            values = item.get(key)
            if not isinstance(values, list) or len(values) != n or not all(map(number, values)):
                return 0.0
    worth = [[pair_worth(i["bbox_2d"], i["point_2d"], t) for t in targets] for i in items]
    return best_matching(worth) / max(len(items), len(targets))


def listed_format(items):
    "Half of it for a box of four, half for a point of two, the mean over the items."
    try:
        total, n = 0.0, len(items)
        for item in items:
            if "bbox_2d" in item and isinstance(item["bbox_2d"], list):
                total += (len(item["bbox_2d"]) == 4) / n
            if "point_2d" in item and isinstance(item["point_2d"], list):
                total += (len(item["point_2d"]) == 2) / n
    except Exception:
        return None  # what was counted before the fault stands; compared where there is none
    return total


def not_repeated(text):
    seen, repeats = set(), 0
    for part in filter(None, (part.strip() for part in text.split("."))):
        repeats += part in seen
        seen.add(part)
    return float(repeats < 2)


def visionreasoner(text, targets):
    inside, items = found(r"<answer>(.*?)</answer>", text), None
    try:
        items = json.loads(inside.strip())
    except Exception:
        pass
    whole = re.fullmatch(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL)
    return dict(
        thinking_format=float(bool(whole)),
        answer_format=listed_format(items) if isinstance(items, list) else 0.0,
        non_repeat=not_repeated(text),
        accuracy=listed_accuracy(items, targets),
    )


# ---- Seg-Zero and PixelThink


def seg_zero(text, target, order=("think", "answer")):
    between = r"\s*".join(f"<{tag}>.*?</{tag}>" for tag in order)
    terms = dict.fromkeys(("answer_format", "iou", "box", "points"), 0.0)
    terms["thinking_format"] = float(bool(re.fullmatch(between, text, re.DOTALL)))
    try:
        item = json.loads(re.search(r"{[^}]+}", text).group(0))
        box, one, two = item.get("bbox"), item.get("points_1"), item.get("points_2")
    except Exception:
        return terms
    right = all(isinstance(v, list) for v in (box, one, two))
    terms["answer_format"] = float(right and [len(v) for v in (box, one, two)] == [4, 2, 2])
    if not isinstance(box, list) or len(box) != 4 or not all(map(number, box)):
        return terms
    w = min(box[2], target.box[2]) - max(box[0], target.box[0])
    h = min(box[3], target.box[3]) - max(box[1], target.box[1])
    terms["iou"] = float(w > 0 and h > 0 and overlap(box, target.box) > 0.5)
    terms["box"] = float(sum(abs(p - q) for p, q in zip(box, target.box)) / 4 < 10)
    try:
        pair = [(int(p[0]), int(p[1])) for p in (one, two) if isinstance(p, list)]
        (a, b), (c, d) = pair
    except Exception:
        return terms
    if all(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in pair):
        true = target.point, target.second

        def away(p, q):
            return sqrt((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2)

        straight = away((a, b), true[0]) + away((c, d), true[1])
        crossed = away((a, b), true[1]) + away((c, d), true[0])
        terms["points"] = float(min(straight, crossed) / 2 < 100)
    return terms


def pixelthink_factor(text, difficulty, uncertainty):
    used = len(text.split())
    if difficulty >= 5:
        budget = 256 + 25 * uncertainty
    elif difficulty >= 3.5:
        return 1.0
    else:
        budget = 96
    return min(1.0, max(0.0, 1 - 0.002 * (used - budget)))


# ---- answers, spoiled


def wobble(rng, v):
    return v + rng.choice([0, 0, 0, 1, -3, 6, -9, 14, 40, -200, 0.5])


def values_of(rng, values):
    "Coordinates that are off, of the wrong number, or none."
    values = [wobble(rng, v) for v in values]
    kind = rng.random()
    if kind < 0.06:
        values[rng.randrange(len(values))] = rng.choice(["12", "x", None, [1], 1e3, "7.5", {}])
    elif kind < 0.10:
        values = values[:-1]
    elif kind < 0.13:
        values = [*values, 5]
    elif kind < 0.15:
        return rng.choice([None, "1,2", {}, 7])
    return values


def spoil(rng, text):
    "Characters that go, come or change places; blocks that go or come twice."
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 5])):
        k, kind = rng.randrange(len(text) + 1), rng.random()
        if kind < 0.3:
            text = text[:k] + text[k + rng.randint(1, 6) :]
        elif kind < 0.6:
            text = (
                text[:k] + rng.choice([" ", "\n", "}", "{", "]", '"', ".", "<answer>"]) + text[k:]
            )
        elif kind < 0.8:
            text = text.replace(*rng.choice([("</think>", ""), ("answer", "anwser"), ("[", "")]), 1)
        else:
            text += rng.choice([" ", "so.", "</answer>", "<answer>[]</answer>", "\n\n"])
    return text


THOUGHTS = ["it is there. so it is", "a. a. a.", "the {cup}", "", "one. two. one.", "so " * 300]


def listed_answer(rng, targets):
    items = []
    for t in rng.sample(targets, rng.randint(0, len(targets))) + rng.sample(
        targets, rng.randint(0, 1)
    ):
        item = dict(bbox_2d=values_of(rng, t.box), point_2d=values_of(rng, t.point))
        if rng.random() < 0.05:
            item.pop(rng.choice([*item]))
        items.append(item)
    return f"<think>{rng.choice(THOUGHTS)}</think><answer>{json.dumps(items)}</answer>"


def single_answer(rng, target, caption=False):
    item = dict(bbox=values_of(rng, target.box), points_1=values_of(rng, target.point))
    item["points_2"] = values_of(rng, target.second)
    if rng.random() < 0.05:
        item.pop(rng.choice([*item]))
    text = f"<think>{rng.choice(THOUGHTS)}</think><answer>{json.dumps(item)}</answer>"
    return text + "<caption>a cup</caption>" if caption else text


def some_target(rng, second=False):
    x1, y1 = rng.randrange(700), rng.randrange(700)
    w, h = rng.choice([0, 1, 9, 60, 130]), rng.choice([0, 1, 9, 60, 130])
    x, y = x1 + w // 2, y1 + h // 3
    two = (x1 + w // 3, y1 + h // 2) if second else None
    return Target((x1, y1, x1 + w, y1 + h), (x, y), second=two)


def terms_of(method, text, targets, **tags):
    sample = Sample("cup", PICTURE, "the cup", tuple(targets), tags)
    margin = [0.25, 0.75]  # an uncertainty of one half
    said = Response(text, method.parse(text), ["a", "b"], [0.1, 0.1], margin, 2)
    terms = method.terms(method, Group(sample, [said], [None]), FRAME)
    return {name: values.item() for name, values in terms.items()}


def test_visionreasoners_reward():
    rng, method, seen = random.Random(SEED), METHODS["visionreasoner"], set()
    for k in range(ANSWERS):
        targets = [some_target(rng) for _ in range(rng.randint(1, 4))]
        text = spoil(rng, listed_answer(rng, targets))
        want, got = visionreasoner(text, targets), terms_of(method, text, targets)
        if want["answer_format"] is None:
            want["answer_format"] = got["answer_format"]
        assert got == pytest.approx(want, abs=1e-6), (k, text)
        seen.add(round(got["accuracy"], 2))
    assert len(seen) > 10  # right ones and wrong ones


@pytest.mark.parametrize("name", ["seg_zero", "dpad"])
def test_seg_zeros_reward(name):
    rng, method, seen = random.Random(SEED + 1), METHODS[name], set()
    caption = name == "dpad"
    order = ("think", "answer", "caption") if caption else ("think", "answer")
    own = METHODS["seg_zero"].terms if not caption else None
    for k in range(ANSWERS):
        target = some_target(rng, second=True)
        text = spoil(rng, single_answer(rng, target, caption))
        if own:
            got = terms_of(method, text, [target])
        else:  # its five terms; the caption's worth needs a scorer
            from dr2seg_lib.methods.seg_zero import score

            got = score(text, [target], FRAME, caption=True)
        assert got == seg_zero(text, target, order), (k, text)
        seen.add(tuple(sorted(got.items())))
    assert len(seen) > 12


def test_pixelthinks_factor():
    rng, method, seen = random.Random(SEED + 2), METHODS["pixelthink"], set()
    for k in range(ANSWERS):
        target, difficulty = some_target(rng, second=True), rng.choice([1, 3.4, 3.5, 4.9, 5, 8.5])
        text = spoil(rng, single_answer(rng, target))
        got = terms_of(method, text, [target], difficulty=difficulty)
        want = seg_zero(text, target) | dict(length=pixelthink_factor(text, difficulty, 0.5))
        assert got == pytest.approx(want, abs=1e-6), (k, text)
        seen.add(round(got["length"], 2))
    assert len(seen) > 5


def described(text, targets, second):
    "DR²Seg's Eqs. 3 to 7 of one answer in a group of which one is right: terms and reward."
    base = visionreasoner(text, targets)
    whole = r"<think>.*?</think>\s*<description>.*?</description>\s*<answer>.*?</answer>"
    base["thinking_format"] = float(bool(re.fullmatch(whole, text, re.DOTALL)))
    return base


def test_dr2segs_base():
    "The three blocks; the rest is VisionReasoner's."
    rng, method = random.Random(SEED + 3), METHODS["dr2seg"]
    for k in range(ANSWERS):
        targets = [some_target(rng) for _ in range(rng.randint(1, 3))]
        text = listed_answer(rng, targets).replace(
            "<answer>", "<description>the cup</description><answer>", rng.choice([0, 1, 1, 1])
        )
        text = spoil(rng, text)
        want, got = described(text, targets, None), terms_of(method, text, targets)
        for name in "thinking_format", "non_repeat", "accuracy":
            assert got[name] == pytest.approx(want[name], abs=1e-6), (k, name, text)
