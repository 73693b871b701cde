"""Colours that stand side by side are told apart by eyes that lack a kind of cone, too.

Seen colours: the matrices of Machado, Oliveira and Fernandes, "A Physiologically-based Model for
Simulation of Color Vision Deficiency", IEEE TVCG 15(6), 2009, severity 1.0, on linear sRGB.
Distances: OKLab (Ottosson 2020), in which just noticeable is about 0.02.
"""

import re
from itertools import combinations

import numpy as np
import pytest

from dr2seg_lib.core.templates import STATIC_FOLDER
from dr2seg_lib.viewing.curves import STAGE_COLOURS
from dr2seg_lib.viewing.group_view import DOWN, UP
from dr2seg_lib.viewing.reward_terms import TERM_COLOURS
from dr2seg_lib.viewing.style import METHOD_COLOURS, OTHER_COLOURS

EYES = dict(
    ordinary=np.eye(3),
    protanopia=[
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    deuteranopia=[
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    tritanopia=[
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
)
CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
OPPONENTS = [
    [0.2104542553, 0.7936177850, -0.0040720468],
    [1.9779984951, -2.4285922050, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.8086757660],
]


def linear(colour):
    "[3] in 0..1, of #rrggbb or of three numbers up to 255."
    if isinstance(colour, str):
        colour = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    c = np.asarray(colour) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def oklab(rgb):
    return np.array(OPPONENTS) @ np.cbrt(np.array(CONES) @ rgb)


def distance(a, b, eyes):
    seen = [np.clip(np.array(EYES[eyes]) @ linear(c), 0, 1) for c in (a, b)]
    return float(np.linalg.norm(oklab(seen[0]) - oklab(seen[1])))


def layers():
    text = (STATIC_FOLDER / "view_picture.js").read_text()
    line = re.search(r"const COLOURS = \{(.*?)\};", text)[1]
    found = re.findall(r"(\w+): \[(\d+), (\d+), (\d+)\]", line)
    return {name: [int(v) for v in rgb] for name, *rgb in found}


CHARTS, PICTURES = 0.07, 0.1  # least distance: a picture's own colours lie beneath
PALETTES = dict(
    layers=(layers(), PICTURES),
    terms=(TERM_COLOURS, CHARTS),
    methods=(METHOD_COLOURS, CHARTS),
    stages=(STAGE_COLOURS, CHARTS),
    others=(dict(enumerate(OTHER_COLOURS)), CHARTS),
    advantage=(dict(up=UP, down=DOWN), CHARTS),
)


def too_near(colours, eyes, least):
    pairs = combinations(colours.items(), 2)
    near = [(a, b, round(distance(x, y, eyes), 3)) for (a, x), (b, y) in pairs]
    return [pair for pair in near if pair[2] < least]


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("name", PALETTES)
def test_colours_that_appear_together_are_told_apart(name, eyes):
    colours, least = PALETTES[name]
    assert len(colours) > 1
    assert too_near(colours, eyes, least) == []


def test_a_confusing_pair_is_found():
    "An olive and an orange that stood for two methods until they were looked at with these eyes."
    pair = dict(olive="#7f8c2d", orange="#c8780a")
    assert too_near(pair, "ordinary", CHARTS) == []
    assert too_near(pair, "protanopia", CHARTS) == [("olive", "orange", 0.018)]


def test_grey_stays_grey_for_all_eyes():
    "Each row of a matrix adds up to one, so it was copied whole."
    for matrix in EYES.values():
        assert np.sum(matrix, 1) == pytest.approx([1, 1, 1], abs=2e-6)


def test_outlines_differ_in_width_too():
    "Truth and prediction are told apart without any colour: a wide line below a narrow one."
    text = (STATIC_FOLDER / "view_picture.js").read_text()
    truth, prediction = re.search(r'name === "truth" \? ([\d.]+) : ([\d.]+)', text).groups()
    assert float(truth) > 2 * float(prediction)


def test_the_report_has_the_same_colours_on_pictures():
    css = (STATIC_FOLDER / "report.css").read_text()
    for name, rgb in layers().items():
        assert f"rgb({' '.join(map(str, rgb))}" in css, name
