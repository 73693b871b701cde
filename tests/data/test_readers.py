"Readers: tiny data sets in the true formats; a broken record is one sentence, and nothing runs."

import hashlib
import io
import json
import os
import pickle
import struct
import sys
import time
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco

from dr2seg_lib.core.masks import encode_rle
from dr2seg_lib.core.parameters import EvaluateConfig, TrainConfig
from dr2seg_lib.data.checking import check_data
from dr2seg_lib.data.datasets import check_disjoint, open_data
from dr2seg_lib.data.folder import FOLDER_FIELDS, FolderDataset
from dr2seg_lib.data.held_out import divide_held_out
from dr2seg_lib.data.images import as_rgb, open_picture, read_pixels
from dr2seg_lib.data.mask_formats import (
    check_drawable,
    coco_mask,
    paint_polygons,
    parse_polygon,
    rle_mask,
)
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.parquet import ParquetDataset
from dr2seg_lib.data.reasonseg import ReasonSegDataset, paint_shapes
from dr2seg_lib.data.records import BrokenRecord, parse_json
from dr2seg_lib.data.row_groups import file_layout, read_layout
from dr2seg_lib.data.safe_pickle import load_plain_pickle, scan_pickle
from dr2seg_lib.data.solutions import parse_solution
from dr2seg_lib.evaluation.config import check_evaluation
from dr2seg_lib.evaluation.evaluate import dataset_info
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.methods.seg_zero import score as seg_zero
from dr2seg_lib.rollouts.parsing import parse_response
from dr2seg_lib.rollouts.response import Group, Response
from dr2seg_lib.training.config import open_training_data

W, H = 40, 30
PHOTO = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
y, x = np.mgrid[:H, :W]
DISC = np.hypot(x - 15, y - 14) < 9
BOX = [[5, 6], [20, 6], [20, 16], [5, 16]]  # 16 × 11 pixels with its outline
masks = arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20)))


def sentence(f, *args, **kwargs):
    "What a call complains of: one line, one sentence."
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        f(*args, **kwargs)
    text = str(e.value)
    assert "\n" not in text, text
    assert text.endswith("."), text
    assert ";" in text, text
    return text


def encoded(image=PHOTO, format="PNG"):
    out = io.BytesIO()
    Image.fromarray(image).save(out, format)
    return out.getvalue()


def shape(points, label="target"):
    return dict(label=label, points=points)


JPEG = encoded(format="JPEG")


@pytest.fixture
def reasonseg(tmp_path):
    "A function that writes one ReasonSeg pair."

    def write(
        name,
        shapes=(),
        text=("what is it",),
        split="val",
        image=JPEG,
        encoding="utf-8",
        root=tmp_path / "ReasonSeg",
        **more,
    ):
        (root / split).mkdir(parents=True, exist_ok=True)
        if image:
            (root / split / f"{name}.jpg").write_bytes(image)
        record = (
            dict(
                text=list(text) if isinstance(text, tuple) else text,
                is_sentence=False,
                shapes=list(shapes) if isinstance(shapes, tuple) else shapes,
            )
            | more
        )
        (root / split / f"{name}.json").write_text(
            json.dumps(record, ensure_ascii=False), encoding=encoding
        )
        return root

    return write


def test_protocols(reasonseg, tmp_path):
    root = reasonseg("a", [shape(BOX), shape([[10, 8], [32, 8], [32, 10], [10, 10]], "ignore")])
    reasonseg("b", [shape(BOX, "ignore")]), reasonseg("c", [])
    for plain, merged in zip(
        open_data(root, "val"), open_data(root, "val", protocol="visionreasoner")
    ):
        covered = plain.mask if plain.ignore is None else plain.mask | plain.ignore
        assert np.array_equal(merged.mask, covered)
        assert merged.ignore is None
        assert len(merged.targets) == covered.any()
        assert merged.query == plain.query
    assert open_data(root, "val").protocol == "lisa"
    assert open_data(root, "val")[0].ignore.any()
    hub = parquet(tmp_path / "ReasonSeg_val" / "test-00000-of-00001.parquet", [hub_row()]).parent
    assert open_data(hub, "val").protocol == "visionreasoner"
    assert "has lost which pixels to ignore" in sentence(open_data, hub, "val", protocol="lisa")
    assert "use lisa or visionreasoner" in sentence(open_data, hub, "val", protocol="lissa")


def test_drawing_again_needs_no_file(reasonseg):
    for name, n in dict(a=5, b=1, c=4).items():
        root = reasonseg(name, text=tuple(f"{name}{k}" for k in range(n)), split="train")
    data = ReasonSegDataset(root, "train")
    assert len(data) == 10
    assert [ReasonSegDataset(root, "train", texts=s).index for s in range(9)] == [
        data.sample_texts(s).index for s in range(9)
    ]
    for file in (root / "train").glob("*.json"):
        file.unlink()
    assert len({tuple(data.sample_texts([7, epoch]).index) for epoch in range(9)}) > 4
    assert len(data) == 10


@pytest.fixture
def own(tmp_path):
    "A function that writes a folder of one's own."

    def write(*records, **files):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / "a.png").write_bytes(encoded())
        for name, data in files.items():
            (tmp_path / f"{name}.png").write_bytes(data)
        rows = [
            r
            if isinstance(r, str)
            else json.dumps(dict(id=f"r{i}", image="images/a.png", query="what") | r)
            for i, r in enumerate(records)
        ]
        (tmp_path / "data.jsonl").write_text("\n".join(rows))
        return tmp_path

    return write


@pytest.fixture
def refcoco(tmp_path):
    "A function that writes refs, instances and an image."

    def write(
        refs,
        segmentation=([[10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]],),
        name="refs(unc).p",
        protocol=0,
        file_name="COCO_train2014_000000000007.jpg",
    ):
        home = tmp_path / "refcoco"
        (home / "images").mkdir(parents=True, exist_ok=True)
        (home / "images" / "COCO_train2014_000000000007.jpg").write_bytes(encoded(format="JPEG"))
        instances = dict(
            categories=[],
            images=[dict(id=7, file_name=file_name, width=W, height=H)],
            annotations=[
                dict(id=70 + i, image_id=7, segmentation=s) for i, s in enumerate(segmentation)
            ],
        )
        (home / "instances.json").write_text(json.dumps(instances))
        (home / name).write_bytes(
            refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=protocol)
        )
        return home

    return write


def ref(id=1, ann=70, split="testA", sents=("the cup", "left thing")):
    "A reference as the release has it."
    return dict(
        ref_id=id,
        ann_id=ann,
        image_id=7,
        split=split,
        category_id=1,
        file_name="COCO_train2014_000000000007_0.jpg",
        sent_ids=[1, 2],
        sentences=[dict(sent=s, raw=s, tokens=s.split(), sent_id=i) for i, s in enumerate(sents)],
    )


def parquet(path, rows, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **kwargs)
    return path


def hub_row(k=0, mask=DISC, **more):
    return (
        dict(
            image=dict(bytes=encoded(), path=None),
            text=f"thing {k}",
            mask=mask.tolist() if isinstance(mask, np.ndarray) else mask,
            image_id="7",
            ann_id=str(k),
            img_height=H,
            img_width=W,
        )
        | more
    )


def training_row(solution, image=PHOTO, **more):
    return (
        dict(
            id="a",
            problem="the cup",
            solution=solution,
            image=dict(bytes=encoded(image), path=None),
            img_height=H,
            img_width=W,
        )
        | more
    )


# masks in their three forms


@given(masks)
def test_rle_round_trip(mask):
    assert np.array_equal(
        rle_mask(json.loads(json.dumps(encode_rle(mask))), mask.shape[::-1], "f", "mask"), mask
    )


@given(masks)
def test_uncompressed_rle_is_as_coco_reads_it(mask):
    runs = np.diff(
        np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [2]]), prepend=2)), prepend=0
    ).tolist()
    rle = dict(size=list(mask.shape), counts=runs)
    if sum(runs) == mask.size:
        assert np.array_equal(
            rle_mask(rle, mask.shape[::-1], "f", "mask"),
            coco.decode(coco.frPyObjects(rle, *mask.shape)),
        )


@given(
    st.one_of(
        st.text(max_size=30),
        st.binary(max_size=20).map(lambda b: b.decode("latin1")),
        st.lists(st.one_of(st.integers(-5, 50), st.floats(), st.none(), st.booleans()), max_size=5),
        st.none(),
        st.integers(),
    )
)
def test_any_counts_give_a_mask_or_a_sentence(counts):
    try:
        assert rle_mask(dict(size=[4, 5], counts=counts), (5, 4), "f", "mask").shape == (4, 5)
    except BrokenRecord as e:
        assert "counts" in str(e)


@given(masks)
def test_outlines_give_the_mask_back(mask):
    "Filled holes aside, contours painted with their outlines are the mask."
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    full = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED)
    assert np.array_equal(
        paint_polygons([c[:, 0] for c in contours], [1] * len(contours), mask.shape[::-1]), full
    )


@given(masks.filter(np.any))
def test_png_round_trip(tmp_path_factory, mask):
    home = tmp_path_factory.mktemp("png")
    Image.fromarray(np.zeros((*mask.shape, 3), np.uint8)).save(home / "a.png")
    Image.fromarray(mask).save(home / "m.png")
    (home / "data.jsonl").write_text(
        json.dumps(dict(id="a", image="a.png", query="q", mask="m.png"))
    )
    assert np.array_equal(FolderDataset(home, "all")[0].mask, mask)


def test_painting_by_hand():
    "The small one shows on the large one in any order; no fractions; the outline belongs to it."
    big, small = (
        np.array([[0, 0], [9, 0], [9, 9], [0, 9]], np.int32),
        np.array([[2, 2], [4, 2], [4, 4], [2, 4]], np.int32),
    )
    for polygons, values in ([big, small], [1, 255]), ([small, big], [255, 1]):
        drawn = paint_polygons(polygons, values, (12, 12))
        assert ((drawn == 255).sum(), (drawn == 1).sum()) == (9, 91)
    assert parse_polygon([[1.9, 2.9], [-1.9, 3], [5, 5]], "f", "p").tolist() == [
        [1, 2],
        [-1, 3],
        [5, 5],
    ]
    assert not paint_polygons([], [], (3, 2)).any()


# pictures


def test_pictures_stand_upright():
    out, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(PHOTO).save(out, "PNG", exif=turned)
    assert np.array_equal(read_pixels(out.getvalue(), "f"), np.rot90(PHOTO, -1))


def written(image, format="PNG", **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [10, 20, 30]]], np.uint8
)
SEEN = np.array([[255, 0, 128], [1, 254, 77]], np.uint8)


def modes():
    "A picture in each of Pillow's modes, and what it looks like, by hand."
    grey, colour = Image.fromarray(SEEN), Image.fromarray(COLOURS)
    palette = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    palette.putpalette(COLOURS.tobytes())  # mode P
    repeated = np.repeat(SEEN[..., None], 3, 2)
    yield "1", Image.fromarray(SEEN > 100), np.where(repeated > 100, 255, 0)
    yield "L", grey, repeated
    yield "LA", Image.merge("LA", [grey, Image.fromarray(255 - SEEN)]), repeated
    yield "P", palette, COLOURS
    yield "PA", palette.convert("PA"), COLOURS
    yield "RGB", colour, COLOURS
    yield "RGBA", Image.merge("RGBA", [*colour.split(), Image.new("L", (3, 2), 0)]), COLOURS
    yield "RGBX", Image.merge("RGBX", [*colour.split(), Image.new("L", (3, 2), 0)]), COLOURS
    yield (
        "CMYK",
        Image.merge("CMYK", [*Image.fromarray(255 - COLOURS).split(), Image.new("L", (3, 2), 0)]),
        COLOURS,
    )
    yield "HSV", Image.fromarray(np.stack([SEEN * 0, SEEN * 0, SEEN], -1), "HSV"), repeated
    yield (
        "YCbCr",
        Image.fromarray(np.stack([SEEN, SEEN * 0 + 128, SEEN * 0 + 128], -1), "YCbCr"),
        repeated,
    )
    for mode in "I;16", "I;16B", "I;16L":
        deep = SEEN.astype(np.uint16) * 257
        yield (
            mode,
            Image.frombytes(
                mode, (3, 2), deep.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
            ),
            repeated,
        )
    yield "I", Image.fromarray(SEEN.astype(np.int32) * 1000 - 70_000), repeated
    yield "F", Image.fromarray(SEEN.astype(np.float32) / 255 * 8 - 4), repeated


@pytest.mark.parametrize(
    "mode, image, looks", [pytest.param(*case, id=case[0]) for case in modes()]
)
def test_every_mode_becomes_rgb(mode, image, looks):
    assert image.mode == mode
    rgb = as_rgb(image)
    assert rgb.dtype == np.uint8
    assert np.array_equal(rgb, looks)
    if mode not in ("I", "F") and ";" not in mode:
        assert np.array_equal(rgb, np.array(image.convert("RGB")))  # as the peers have it


FILES = {
    "1": "PNG BMP",
    "L": "PNG BMP JPEG",
    "LA": "PNG WEBP",
    "P": "PNG BMP",
    "RGB": "PNG BMP JPEG WEBP",
    "RGBA": "PNG WEBP",
    "CMYK": "JPEG",
    "I;16": "PNG",
}


@pytest.mark.parametrize(
    "mode, format", [(mode, f) for mode, formats in FILES.items() for f in formats.split()]
)
def test_every_mode_that_a_file_has(mode, format):
    "Against OpenCV's decoders, which are not Pillow's; for CMYK, which it reads otherwise, Pillow."
    image, looks = next((i, shown) for m, i, shown in modes() if m == mode)
    big = (
        image.resize((48, 32), Image.NEAREST)
        if mode != "I;16"
        else Image.fromarray(np.array(image).repeat(16, 0).repeat(16, 1))
    )
    data = written(
        big,
        format,
        **(
            {"lossless": True, "exact": True}
            if format == "WEBP"
            else {"quality": 100, "subsampling": 0}
            if format == "JPEG"
            else {}
        ),
    )
    rgb = read_pixels(data, "f")
    other = (
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        if mode != "CMYK"
        else np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    )
    tolerance = (
        12 if format == "JPEG" else 1 if mode == "I;16" else 0
    )  # OpenCV cuts 16 bits to the upper 8
    assert np.abs(rgb.astype(int) - other).max() <= tolerance
    assert np.abs(rgb.astype(int) - looks.repeat(16, 0).repeat(16, 1)).max() <= (
        40 if format == "JPEG" else 0
    )


@given(arrays(np.uint16, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_16_bits_of_grey_are_scaled_by_their_range(values):
    "A 16-bit grey PNG is white at 65,535, as the PNG specification says, whatever it holds."
    rgb = read_pixels(written(Image.fromarray(values)), "f")
    assert np.array_equal(
        rgb, np.repeat(np.rint(values / 65535 * 255).astype(np.uint8)[..., None], 3, 2)
    )


def test_transparent_and_moving_pictures():
    "What transparent pixels hide is shown, as by Pillow's convert; of a moving picture, the first."
    palette = next(i for m, i, _ in modes() if m == "P")
    for transparent in 2, bytes([0, 255, 0, 255, 0, 9]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.array_equal(
                read_pixels(written(palette, transparency=transparent), "f"), COLOURS
            )
    frames = [Image.fromarray(np.full((4, 4, 3), v, np.uint8)) for v in (10, 200)]
    for format in "PNG", "WEBP":
        options = dict(lossless=True) if format == "WEBP" else {}
        data = written(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 2
        assert (read_pixels(data, "f") == 10).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_pictures_and_their_masks(own, orientation):
    "The masks are drawn on the picture as it is seen: upright, in all three forms."
    raw = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    turned = Image.Exif()
    turned[0x0112] = orientation
    stored, png = (np.ascontiguousarray(raw(a)) for a in (PHOTO, (DISC * 255).astype(np.uint8)))
    home = own(
        dict(mask=encode_rle(DISC)),
        dict(mask="m.png"),
        dict(mask="turned.png"),
        dict(mask=encode_rle(raw(DISC))),
        dict(polygon=BOX),
        m=encoded((DISC * 255).astype(np.uint8)),
        turned=written(Image.fromarray(png), exif=turned),
    )
    (home / "images" / "a.png").write_bytes(written(Image.fromarray(stored), exif=turned))
    data = open_data(home, "all")
    for s in (data[i] for i in range(3)):
        assert np.array_equal(s.image, PHOTO)
        assert np.array_equal(s.mask, DISC)
    assert data[4].mask.sum() == 16 * 11
    if orientation > 4:
        assert "the upright image" in sentence(
            data.__getitem__, 3
        )  # drawn on the picture as it is stored


def bmp_of_runs(side):
    "A BMP in run lengths, which Pillow decodes one by one in Python."
    runs = bytes([255, 7]) * (side * side // 255 + 1) + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return (
        b"BM"
        + struct.pack("<IHHI", 14 + 40 + 1024 + len(runs), 0, 0, 14 + 40 + 1024)
        + head
        + bytes(1024)
        + runs
    )


def jpeg_of_scans(n):
    whole = written(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    return whole[:-2] + whole[whole.rindex(b"\xff\xda") : -2] * n + b"\xff\xd9"


def png_of_text():
    "Chunks of text that unfold to 256 MB each."

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    squeeze = zlib.compressobj(9)
    text = b"".join([*(squeeze.compress(bytes(2**20)) for _ in range(256)), squeeze.flush()])
    whole = encoded()
    return (
        whole[:33] + chunk(b"zTXt", b"k\0\0" + text) + chunk(b"iCCP", b"k\0\0" + text) + whole[33:]
    )


@pytest.mark.parametrize(
    "bomb, words",
    [
        (lambda: jpeg_of_scans(100), "106 scans"),
        (lambda: bmp_of_runs(64), "run lengths"),
        (png_of_text, ""),
    ],
)
def test_pictures_that_cost_too_much(bomb, words):
    data, began = bomb(), time.process_time()
    try:
        assert read_pixels(data, "f").shape == PHOTO.shape
        assert not words
    except BrokenRecord as e:
        assert words in str(e)
    assert time.process_time() - began < 5
    assert len(data) < 5_000_000
    assert read_pixels(jpeg_of_scans(20), "f").shape == (64, 64, 3)


def test_what_is_no_plain_file_is_not_waited_for(own):
    home = own(dict(mask=[]))
    (home / "images" / "a.png").unlink()
    os.mkfifo(home / "images" / "a.png")
    assert "is no file" in sentence(open_data(home, "all").__getitem__, 0)
    (home / "images" / "a.png").unlink()
    (home / "images" / "a.png").symlink_to("/dev/zero")
    assert "is no file" in sentence(open_data(home, "all").__getitem__, 0)
    assert "cannot be read" in sentence(
        open_data(own(dict(mask=[], image="images/" + "x" * 5000 + ".png")), "all").__getitem__, 0
    )
    home = own(dict(mask=[], image="images/b.png"))
    with open(home / "images" / "b.png", "wb") as f:
        f.truncate(2**30)  # takes no room on the disk
    assert "longer than" in sentence(open_data(home, "all").__getitem__, 0)


@pytest.mark.parametrize("side", [9_000, 13_000, 100_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_declared_size_is_not_decoded(side):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )
    assert "pixels" in sentence(open_picture, bomb, "f")


@given(st.sampled_from([encoded(), encoded(format="JPEG")]), st.data())
def test_damaged_pictures_are_decoded_or_told(whole, data):
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, min(len(damaged) - 1, 300)))] = data.draw(
                st.integers(0, 255)
            )
    try:
        open_picture(bytes(damaged), "f").convert("RGB")
    except BrokenRecord:
        pass


def test_only_plain_picture_formats_are_opened():
    out = io.BytesIO()
    Image.fromarray(PHOTO).save(out, "EPS")  # its decoder is a program
    assert "cannot be decoded" in sentence(open_picture, out.getvalue(), "f")


# ReasonSeg


def test_reasonseg_by_hand(reasonseg):
    root = reasonseg(
        "a",
        [
            shape(BOX),
            shape([[10, 8], [12, 8], [12, 10], [10, 10]], "ignore_region"),
            shape([], "flag"),
        ],
        is_sentence=True,
    )
    (s,) = ReasonSegDataset(root, "val")
    assert (s.id, s.query, s.size, s.tags, len(s.targets)) == (
        "a",
        "what is it",
        (W, H),
        {"query": "long"},
        1,
    )
    assert s.ignore.sum() == 9
    assert s.mask.sum() == 16 * 11 - 9
    assert not (s.mask & s.ignore).any()
    assert s.targets[0].box == (5, 6, 20, 16)


def test_several_polygons_are_one_target(reasonseg):
    (s,) = ReasonSegDataset(
        reasonseg("a", [shape(BOX), shape([[30, 20], [35, 20], [35, 25]])]), "val"
    )
    assert len(s.targets) == 1
    assert s.targets[0].box == (5, 6, 35, 25)


def lisas_mask(shapes):
    "utils/data_processing.py of LISA: areas by drawing, then from the largest to the smallest."
    drawn = []
    for one in shapes:
        if one["label"].lower() == "flag":
            continue
        points, alone = np.array([one["points"]], dtype=np.int32), np.zeros((H, W), np.uint8)
        cv2.polylines(alone, points, True, 1, 1)
        cv2.fillPoly(alone, points, 1)
        drawn.append((int(alone.sum()), points, 255 if "ignore" in one["label"].lower() else 1))
    mask = np.zeros((H, W), np.uint8)
    for k in np.argsort([area for area, _, _ in drawn])[::-1]:
        cv2.polylines(mask, drawn[k][1], True, drawn[k][2], 1)
        cv2.fillPoly(mask, drawn[k][1], drawn[k][2])
    return mask


places = st.tuples(st.integers(-9, W + 9), st.floats(-9, H + 9).map(lambda v: round(v, 2)))
outlines = st.lists(places.map(list), min_size=1, max_size=7)
labels = st.sampled_from(["target", "Ignore", "flag", "ignored part", "FLAG", "the cup"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.builds(shape, outlines, labels), max_size=6))
def test_shapes_are_drawn_as_lisa_draws_them(shapes):
    "Dots and lines too: one and two points."
    targets, ignore = paint_shapes(shapes, (W, H), "a file")
    want = lisas_mask(shapes)
    empty = np.zeros((H, W), bool)
    assert np.array_equal(targets[0].mask if targets else empty, want == 1)
    assert np.array_equal(empty if ignore is None else ignore, want == 255)


def test_each_polygon_may_be_a_target(reasonseg):
    "In the order of the file; a pixel to ignore belongs to none, and both masks make the one."
    shapes = [shape(BOX), shape([[30, 20], [35, 20], [35, 25]])]
    shapes += [shape([[5, 6], [8, 6], [8, 8], [5, 8]], "ignore"), shape(BOX, "flag")]
    root = reasonseg("a", shapes, split="train")
    (one,) = open_training_data(TrainConfig(data=str(root), evaluation=dict(samples=0)))
    each = TrainConfig(data=dict(name=str(root), polygons="each"), evaluation=dict(samples=0))
    (two,) = open_training_data(each)
    assert [t.box for t in two.targets][1:] == [(30, 20, 35, 25)]
    assert len(two.targets) == 2
    assert np.array_equal(two.mask, one.mask)
    assert not (two.mask & two.ignore).any()
    (drawn_one_text,) = open_training_data(each).sample_texts(0)
    assert len(drawn_one_text.targets) == 2


def test_polygons_are_of_reasonseg(own):
    "Any other data set says itself what its objects are."
    config = TrainConfig(data=dict(polygons="each"))
    assert "leave it out" in str(pytest.raises(ValueError, open_training_data, config).value)


def test_files_without_polygons_are_samples(reasonseg):
    for name, shapes in dict(a=[], b=[shape(BOX, "flag")], c=[shape(BOX, "ignore")]).items():
        root = reasonseg(name, shapes)
    a, b, c = ReasonSegDataset(root, "val")
    assert a.targets == b.targets == c.targets == ()
    assert a.ignore is None
    assert c.ignore.sum() == 16 * 11


def test_cp1252_where_utf8_fails(reasonseg):
    reasonseg("a", text=["a café"])
    assert [
        s.query
        for s in ReasonSegDataset(
            reasonseg("b", text=["the waiter’s café"], encoding="cp1252"), "val"
        )
    ] == ["a café", "the waiter’s café"]


def test_texts(reasonseg):
    for split in "val", "train":
        for name in "ab":
            root = reasonseg(name, text=[f"{name}{k}" for k in range(3)], split=split)

    def asked(split, **o):
        return [s.query for s in open_data(root, split, **o)]

    assert asked("val") == asked("train", texts="first") == ["a0", "b0"]
    assert asked("train") == asked("val", texts="all") == ["a0", "a1", "a2", "b0", "b1", "b2"]
    drawn = [asked("train", texts=seed) for seed in range(20)]
    assert all([t[0] for t in d] == ["a", "b"] for d in drawn)
    assert len(set(map(tuple, drawn))) > 5
    assert drawn[3] == asked("train", texts=3)
    assert len({s.id for s in ReasonSegDataset(root, "train")}) == 6
    assert "texts" in sentence(ReasonSegDataset, root, "train", texts="some")


def test_both_layouts(reasonseg, tmp_path):
    root = reasonseg("a", root=tmp_path / "reason_seg" / "ReasonSeg")
    (root / "explanatory").mkdir()
    (root / "explanatory" / "train.json").write_text("[]")
    for path in tmp_path, root.parent, root, root / "val":
        assert [s.id for s in open_data(path, "val")] == ["a"]
    assert "use one of val" in sentence(open_data, root, "test")
    assert "use one of val" in sentence(open_data, root / "val", "train")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(shapes=[shape([])]), ["shapes[0].points", "0 points"]),
        (dict(shapes=[shape([[1, 1], [5, float("nan")], [3, 3]])]), ["shapes[0].points", "finite"]),
        (dict(shapes=[shape([[1, 1], [5, 1e12], [3, 3]])]), ["shapes[0].points"]),
        (dict(shapes=[shape("1,1")]), ["shapes[0].points"]),
        (dict(shapes=[shape([[1, "1"], [5, 5], [3, 3]])]), ["shapes[0].points"]),
        (dict(shapes=[shape([[1, True], [5, 5], [3, 3]])]), ["shapes[0].points"]),
        (dict(shapes=[dict(points=BOX)]), ["label", "missing"]),
        (dict(shapes=["target"]), ["label", "object"]),
        (dict(shapes=None), ["shapes", "list"]),
        (dict(text="what"), ["text", "list"]),
        (dict(text=[]), ["text[0]", "missing"]),
        (dict(text=[5]), ["text[0]", "a text"]),
        (dict(text=[" "]), ["text[0]", "blank"]),
        (dict(is_sentence="no"), ["is_sentence"]),
        (dict(image=encoded(format="JPEG")[:500]), ["decoded"]),
        (dict(image=b"GIF89a"), ["decoded"]),
        (dict(image=None), ["a.jpg", "does not exist"]),
    ],
)
def test_broken_reasonseg_is_told(reasonseg, change, words):
    reasonseg("whole", [shape(BOX)])
    root = reasonseg("a", **change)
    data = ReasonSegDataset(root, "val")
    assert len(data) == 2
    assert data[1].id == "whole"
    told = sentence(data.__getitem__, 0)
    assert "a.json" in told
    assert all(w in told for w in words)
    report = check_data(root)
    assert report.broken == (told,)
    assert report.splits["val"]["samples"] == 1


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "[]", "5", "", '"\x81"'])
def test_broken_json_is_told(reasonseg, text):
    root = reasonseg("a")
    (root / "val" / "a.json").write_bytes(text.encode("latin1"))
    assert "a.json" in sentence(ReasonSegDataset(root, "val").__getitem__, 0)
    assert len(check_data(root).broken) == 1


def test_an_image_without_annotation_is_told(reasonseg):
    root = reasonseg("a")
    (root / "val" / "b.jpg").write_bytes(encoded(format="JPEG"))
    assert "b.json" in sentence(ReasonSegDataset(root, "val").__getitem__, 1)


# parquet


def test_evaluation_set_across_shards_and_groups(tmp_path):
    data = tmp_path / "ReasonSeg_val" / "data"
    rows = [hub_row(k, np.roll(DISC, k, 1) & (k != 2)) for k in range(5)]
    parquet(data / "test-00000-of-00002.parquet", rows[:3], row_group_size=2)
    parquet(data / "test-00001-of-00002.parquet", rows[3:], row_group_size=1)
    for split in "val", "test", "testA":
        hub = open_data(tmp_path / "ReasonSeg_val", split)
        assert [s.query for s in hub] == [f"thing {k}" for k in range(5)]
        assert hub[2].targets == ()
        assert len({s.id for s in hub}) == 5
        for k in 4, 0, 3, 1:
            assert np.array_equal(hub[k].mask, np.roll(DISC, k, 1))
            assert np.array_equal(hub[k].image, PHOTO)
    assert len(open_data(tmp_path / "ReasonSeg_val", "val", limit=3)) == 3
    assert "use one of test" in sentence(open_data, tmp_path / "ReasonSeg_val", "train")
    counts = check_data(tmp_path / "ReasonSeg_val").splits["test"]
    assert (counts["samples"], counts["images"], counts["targets"], counts["without targets"]) == (
        5,
        1,
        4,
        1,
    )


def test_one_group_is_held(tmp_path):
    file = parquet(
        tmp_path / "test-00000-of-00001.parquet", [hub_row(k) for k in range(6)], row_group_size=2
    )
    hub, read = ParquetDataset(file, "test"), []
    for _s in hub:
        read.append(hub.cached[1].num_rows)
    assert read == [2] * 6


def test_training_set(tmp_path):
    frame = cv2.resize(PHOTO, (840, 840))
    solution = (
        '[{"bbox_2d": [84, 100, 420, 800], "point_2d": [200, 300]}, '
        '{"bbox_2d": [0, 0, 840, 840], "point_2d": [420, 420]}]'
    )
    parquet(
        tmp_path / "data" / "train-00000-of-00001.parquet",
        [training_row(solution, frame, difficulty=4.5)],
    )
    (s,) = open_data(tmp_path, "train")
    assert (s.id, s.query, s.size, s.tags) == ("a", "the cup", (840, 840), {"difficulty": 4.5})
    assert [(t.box, t.point) for t in s.scaled(840)] == [
        ((84, 100, 420, 800), (200, 300)),
        ((0, 0, 840, 840), (420, 420)),
    ]
    assert "use one of train" in sentence(open_data, tmp_path, "val")


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 840), st.integers(0, 840))
def test_solutions_survive_an_image_of_any_size(w, h, a, b):
    box = [min(a, b), 0, max(a, b), b]
    (t,) = parse_solution(json.dumps([dict(bbox_2d=box, point_2d=[a, b])]), (w, h), "f")
    back = [int(v * 840 / n + 0.5) for v, n in zip((*t.box, *t.point), (w, h) * 3)]
    assert back == [*box, a, b]


def test_seg_zero_solutions_keep_both_points():
    (t,) = parse_solution(
        "<box>(84,100),(420,800)</box><points>(200,300),(210,600)</points>", (840, 840), "f"
    )
    assert (t.box, t.point, t.second) == ((84, 100, 420, 800), (200, 300), (210, 600))
    (visionreasoner,) = parse_solution(
        '[{"bbox_2d": [84, 100, 420, 800], "point_2d": [200, 300]}]', (840, 840), "f"
    )
    assert visionreasoner.second is None


# a row as Seg-Zero's own script writes it: two lines, no spaces, the frame's whole pixels
SEG_ZERO = "<box>(84,210),(420,630)</box>\n<points>(210,315),(378,525)</points>"


@pytest.fixture
def seg_zero_set(tmp_path):
    "Seg-Zero's training set by hand: its columns, in its order, and no others."
    columns = dict(
        id=["refcocog_7"],
        problem=["the cup"],
        solution=[SEG_ZERO],
        image=[dict(bytes=encoded(cv2.resize(PHOTO, (840, 840))), path=None)],
        img_height=[H],
        img_width=[W],
    )
    file = tmp_path / "refCOCOg_2k_840" / "data" / "train-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), file)
    return open_data(file.parent.parent, "train")


def test_seg_zero_set_by_hand(seg_zero_set):
    (s,) = seg_zero_set
    (t,) = s.scaled(840)
    assert (s.id, s.query, s.size) == ("refcocog_7", "the cup", (840, 840))
    assert (t.box, t.point, t.second) == ((84, 210, 420, 630), (210, 315), (378, 525))
    (half,) = s.scaled(420)
    assert (half.point, half.second) == ((105, 158), (189, 263))


ANSWER = (
    '<think>A cup.</think><answer>{"bbox": [84, 210, 420, 630], '
    '"points_1": [378, 525], "points_2": [210, 315]}</answer>'
)


@pytest.mark.parametrize("method", ["seg_zero", "pixelthink", "dpad"])
def test_seg_zero_sets_are_rewarded(seg_zero_set, method):
    "The points of the answer lie in its box; what compares them with the true ones must have two."
    text = ANSWER + "<caption>a cup</caption>" if method == "dpad" else ANSWER
    answers = [
        Response(t, parse_response(t), [1, 2], [0.1, 0.1], [0.9, 0.9], 2)
        for t in (text, text.replace("[378, 525]", "[90, 620]"))
    ]
    terms, total = METHODS[method].reward(Group(seg_zero_set[0], answers, [None, None]), 840)
    assert all(
        terms[k].tolist() == [1, 1] for k in ("thinking_format", "answer_format", "iou", "box")
    )
    assert terms["points"].tolist() == [1, 0]
    assert total[0] > total[1]


def training_with(seg_zero_set, tmp_path, records):
    "PixelThink's training on that set, with a file of difficulties."
    (tmp_path / "labels.json").write_text(json.dumps(records))
    data = dict(name=str(tmp_path / "refCOCOg_2k_840"), difficulty=str(tmp_path / "labels.json"))
    return open_training_data(TrainConfig(method="pixelthink", data=data))


def test_pixelthink_takes_its_difficulties_from_its_file(seg_zero_set, tmp_path, recwarn):
    "The file as PixelThink's loader reads it: a list, joined by the row's id; 500 words are spent."
    words = ANSWER.replace("A cup.", " ".join(["so"] * 500))
    said = Response(words, parse_response(words), [1, 2], [0.1, 0.1], [0.9, 0.9], 2)

    def length(sample):
        return (
            METHODS["pixelthink"]
            .terms(METHODS["pixelthink"], Group(sample, [said], [None]), 840)["length"]
            .item()
        )

    used = len(words.split())
    found = {}
    for d in (2, 4, 9.5):
        record = dict(image_id="refcocog_7", difficulty_score_model=d, text="the cup")
        found[d] = length(training_with(seg_zero_set, tmp_path, [record])[0])
    assert found == {
        2: pytest.approx(1 + (96 - used) / 500),
        4: 1,
        9.5: pytest.approx(1 + (256 + 25 * 0.1 - used) / 500, abs=1e-6),
    }
    assert not [w for w in recwarn if "difficulty" in str(w.message)]
    with pytest.warns(UserWarning, match=r"taken as of 3.0.*data.difficulty"):
        assert length(seg_zero_set[0]) == pytest.approx(found[2])


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([dict(image_id="other", difficulty_score_model=2)], "is of other images"),
        ([dict(image_id="refcocog_7", difficulty_score_model="2")], "has no difficulties"),
        (dict(refcocog_7=2), "is no list of records"),
        ([2], "is no list of records"),
    ],
)
def test_a_file_of_other_difficulties_is_told(seg_zero_set, tmp_path, records, words):
    assert words in sentence(training_with, seg_zero_set, tmp_path, records)


def test_an_evaluation_counts_by_expression_too(refcoco):
    "LISA counts every expression, VisionReasoner every object once."
    home = refcoco([ref(1), ref(2, sents=("a mug",))])
    counts = {}
    for level in "instance", "expression":
        data = dict(name=str(home), split="testA", level=level)
        counts[level] = [s.query for s in check_evaluation(EvaluateConfig(data=data))]
    assert counts["instance"] == ["the cup", "a mug"]
    assert counts["expression"] == ["the cup", "left thing", "a mug"]
    config = EvaluateConfig(data=dict(level="expression"))
    assert "leave it out" in str(pytest.raises(ValueError, check_evaluation, config).value)


def test_the_embedded_world_has_its_own_difficulties(tmp_path):
    (tmp_path / "labels.json").write_text("[]")
    config = TrainConfig(data=dict(difficulty=str(tmp_path / "labels.json")))
    assert "leave it out" in sentence(open_training_data, config)


def test_targets_without_a_second_point_are_rewarded():
    "VisionReasoner's solutions have boxes and one point; Seg-Zero's terms take it for both."
    one = parse_solution(
        '[{"bbox_2d": [84, 210, 420, 630], "point_2d": [210, 315]}]', (840, 840), "f"
    )
    both = ANSWER.replace("[378, 525]", "[220, 320]")
    assert set(seg_zero(both, list(one)).values()) == {1}
    assert seg_zero(ANSWER, list(one))["points"] == 0
    two = parse_solution(
        '[{"bbox_2d": [84, 210, 200, 630], "point_2d": [210, 315]}, '
        '{"bbox_2d": [300, 300, 420, 500], "point_2d": [378, 525]}]',
        (840, 840),
        "f",
    )
    assert set(seg_zero(ANSWER, list(two)).values()) == {1}


@pytest.mark.parametrize(
    "solution",
    [
        "",
        "nothing",
        "{}",
        "5",
        "[5]",
        '[{"bbox_2d": [1, 2, 3, 4]}]',
        '[{"bbox_2d": [1, 2, 3], "point_2d": [1, 2]}]',
        '[{"bbox_2d": [1, 2, 900, 4], "point_2d": [1, 2]}]',
        '[{"bbox_2d": [5, 2, 3, 4], "point_2d": [1, 2]}]',
        '[{"bbox_2d": [1, 2, NaN, 4], "point_2d": [1, 2]}]',
        f"<box>({'1' * 5000},2),(3,4)</box><points>(1,2),(3,4)</points>",
        "<box>(1,2),(3,4)</box><points>(1,2)</points>",
        '[{"bbox_2d": [1, 2, 3, 4], "point_2d": ["1", 2]}]',
        '[{"bbox_2d": [-1, 2, 3, 4], "point_2d": [1, 2]}]',
        "<box>(84,100),(920,800)</box><points>(200,300),(210,600)</points>",
    ],
)
def test_broken_solutions_are_told(tmp_path, solution):
    file = parquet(
        tmp_path / "train-00000-of-00001.parquet",
        [training_row(solution), training_row("[]", id="b")],
    )
    data = ParquetDataset(file, "train")
    told = sentence(data.__getitem__, 0)
    assert "row 0" in told
    assert "solution" in told
    assert data[1].targets == ()
    assert check_data(file).broken == (told,)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(mask=DISC[:, :-1].tolist()), "mask"),
        (dict(mask=DISC.tolist()[:-1]), "mask"),
        (dict(mask=None), "mask"),
        (dict(mask=[[None] * W] * H), "mask"),
        (dict(mask=[[True] * (W + k % 2) for k in range(H)]), "mask"),
        (dict(mask=[]), "mask"),
        (dict(text=None), "text"),
        (dict(text=" "), "text"),
        (dict(image=dict(bytes=None, path="/etc/passwd")), "image"),
        (dict(image=None), "image"),
        (dict(image=dict(bytes=encoded()[:300], path=None)), "image"),
    ],
)
def test_broken_rows_are_told(tmp_path, change, words):
    file = parquet(tmp_path / "test-00000-of-00001.parquet", [hub_row(), hub_row(1, **change)])
    data = ParquetDataset(file, "test")
    told = sentence(data.__getitem__, 1)
    assert "row 1" in told
    assert words in told
    assert data[0].mask.any()
    assert check_data(file).broken == (told,)


def test_broken_parquet_files_are_told(tmp_path):
    file = parquet(tmp_path / "test-00000-of-00001.parquet", [hub_row()])
    whole = file.read_bytes()
    for data in whole[:-20], b"", b"PAR1" + b"x" * 100 + b"PAR1":
        file.write_bytes(data)
        assert file.name in sentence(open_data, tmp_path, "test")
        assert len(check_data(tmp_path).broken) == 1
    file.write_bytes(whole[:4] + b"\xff" * 2000 + whole[2004:])
    assert len(check_data(tmp_path).broken) == 1


@pytest.mark.parametrize(
    "rows, words",
    [
        ([dict(a=1)], "columns"),
        ([hub_row(mask=DISC) | dict(mask="x")], "mask"),
        ([hub_row() | dict(mask=[1.5])], "mask"),
    ],
)
def test_other_columns_are_told(tmp_path, rows, words):
    assert words in sentence(open_data, parquet(tmp_path / "a.parquet", rows), "val")


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    file = parquet(tmp_path / "a.parquet", [hub_row()])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in sentence(open_data, file, "val")


# RefCOCO


@pytest.mark.parametrize("protocol", range(6))
def test_refcoco_by_hand(refcoco, protocol):
    home = refcoco(
        [ref(), ref(2, split="testB", sents=["x"]), ref(3, split="train", sents=["y", "z", "w"])],
        protocol=protocol,
    )
    assert [len(open_data(home, s)) for s in ("testA", "testB", "train", "test")] == [1, 1, 1, 2]
    assert [
        len(open_data(home, s, level="expression")) for s in ("testA", "testB", "train", "test")
    ] == [2, 1, 3, 3]
    s = open_data(home, "testA")[0]
    assert (s.id, s.query, s.targets[0].box, s.size) == (
        "1",
        "the cup",
        (10, 10, 29, 19),
        (W, H),
    )
    assert s.mask.sum() == 200
    assert [(s.id, s.query) for s in open_data(home, "testA", level="expression")] == [
        ("1#0", "the cup"),
        ("1#1", "left thing"),
    ]
    assert "use one of testA, testB, train" in sentence(open_data, home, "val")
    assert check_data(home).splits["train"]["samples"] == 1


def test_python_2_pickles_are_read(refcoco):
    "As cPickle of Python 2 wrote them: byte strings, old names of builtins."
    data = (
        b"(lp1\n(dp2\nS'ref_id'\np3\nI1\nsS'ann_id'\np4\nI70\nsS'split'\np5\nS'val'\np6\n"
        b"sS'ids'\nc__builtin__\nset\n((lI5\natRsS'sentences'\np7\n(lp8\n(dp9\nS'sent'\np10\n"
        b"Vcaf\\u00e9\np11\nsasa."
    )
    assert open_data(refcoco(data), "val")[0].query == "café"


def test_unc_and_umd_come_first(refcoco):
    refcoco([ref(split="val", sents=["google"])], name="refs(google).p")
    assert (
        open_data(refcoco([ref(split="val", sents=["umd"])], name="refs(umd).p"), "val")[0].query
        == "umd"
    )


def test_parts_and_run_lengths_of_an_instance(refcoco):
    parts = [
        [0.0, 0.0, 4.0, 0.0, 4.0, 4.0, 0.0, 4.0],
        [10.0, 10.0, 12.0, 10.0, 12.0, 12.0, 10.0, 12.0],
    ]
    home = refcoco(
        [ref(k, 70 + k, sents=[str(k)]) for k in range(3)],
        segmentation=[parts, encode_rle(DISC), []],
    )
    a, b, c = open_data(home, "testA")
    assert a.mask.sum() == 20
    assert len(a.targets) == 1
    assert np.array_equal(b.mask, DISC)
    assert c.targets == ()


def test_the_joined_file_is_made_once_and_anew_when_the_pickle_changes(refcoco, monkeypatch):
    home = refcoco([ref()])
    open_data(home, "testA")
    assert sorted(p.name for p in home.iterdir()) == [
        "images",
        "instances.json",
        "refs(unc).jsonl",
        "refs(unc).p",
    ]
    with monkeypatch.context() as m:
        m.setattr(
            "dr2seg_lib.data.refcoco.load_plain_pickle", lambda file: pytest.fail("read again")
        )
        open_data(home, "testA")
    refcoco([ref(sents=["other words"])])
    os.utime(home / "refs(unc).p", ns=(1, 1))
    assert open_data(home, "testA")[0].query == "other words"


def test_a_folder_that_cannot_be_written(refcoco, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, how: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert len(open_data(refcoco([ref()]), "testA")) == 1
    assert len(list((tmp_path / "home" / ".cache" / "dr2seg").iterdir())) == 1


class Runs:
    "A pickle that runs a command."

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_runs_code_is_refused(refcoco, tmp_path, protocol):
    home = refcoco([ref() | dict(ref_id=Runs(f"touch {tmp_path}/ran"))], protocol=protocol)
    told = sentence(open_data, home, "testA")
    assert "refs(unc).p" in told
    assert "system" in told
    assert check_data(home).broken == (told,)
    assert not (tmp_path / "ran").exists()
    assert not list(home.glob("*.jsonl*"))


@pytest.mark.parametrize(
    "value",
    [
        np.float64(1.0),
        np.zeros(2),
        Path("x"),
        pytest.raises,
        ValueError("x"),
        io.BytesIO(b"x"),
        complex(1, 2),
    ],
)
def test_only_plain_data_is_built(tmp_path, value):
    for protocol in 2, 4:
        (tmp_path / "x.p").write_bytes(pickle.dumps([value], protocol=protocol))
        assert "asks for" in sentence(load_plain_pickle, tmp_path / "x.p")


whole = st.integers(-(2**54), 2**54)
plain = st.recursive(
    st.none() | st.booleans() | whole | st.floats(allow_nan=False) | st.text() | st.sets(whole),
    lambda s: st.lists(s) | st.dictionaries(st.text(), s) | st.tuples(s, s),
    max_leaves=10,
)


@given(plain, st.integers(0, 5))
def test_plain_data_comes_back(tmp_path_factory, value, protocol):
    file = tmp_path_factory.getbasetemp() / "plain.p"
    file.write_bytes(pickle.dumps(value, protocol=protocol))
    assert load_plain_pickle(file) == value


@given(st.binary(max_size=60), st.integers(0, 5), st.data())
def test_any_bytes_are_plain_data_or_refused(tmp_path_factory, data, protocol, draw):
    whole = bytearray(pickle.dumps([ref()], protocol=protocol))
    at = draw.draw(st.integers(0, len(whole)))
    file = tmp_path_factory.getbasetemp() / "any.p"
    for content in data, bytes(whole[:at] + data + whole[at:]), bytes(whole[:at]):
        file.write_bytes(content)
        try:
            load_plain_pickle(file)
        except BrokenRecord:
            pass


@pytest.mark.parametrize(
    "refs, words",
    [
        ([ref(), ref(2, ann=99)], "ann_id"),
        ([ref(), ref() | dict(ref_id="x")], "ref_id"),
        ([ref(), ref(2) | dict(split=5)], "split"),
        ([ref(), 5], "ann_id"),
        ([ref(), ref(2) | dict(sentences="x")], "sentences"),
        ([ref(), ref(2, sents=[])], "sentences[0]"),
        ([ref(), ref(2, sents=[""])], "sentences[0]"),
        ([ref(), ref(2) | dict(sentences=[5])], "sentences[0]"),
        ([ref(), {k: v for k, v in ref(2).items() if k != "ann_id"}], "ann_id"),
    ],
)
def test_broken_references_are_told(refcoco, refs, words):
    home = refcoco(refs)
    data = open_data(home, "testA")
    told = sentence(data.__getitem__, 1)
    assert len(data) == 2
    assert words in told
    assert "refs(unc)" in told
    assert data[0].query == "the cup"
    assert check_data(home).broken == (told,)


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1.0, 1.0, 5.0, 5.0]],
        [[1.0, 1.0, 5.0, 5.0, 3.0]],
        [[1.0, 1.0, 5.0, float("nan"), 3.0, 3.0]],
        "x",
        None,
        [5],
        [[0.0, 0.0, 1e9, 0.0, 1.0, 1.0]],
        dict(size=[H, W], counts="xyz"),
        dict(size=[W, H], counts=[W * H]),
    ],
)
def test_broken_instances_are_told(refcoco, segmentation):
    assert "segmentation" in sentence(
        open_data(refcoco([ref()], [segmentation]), "testA").__getitem__, 0
    )


def test_refs_that_are_no_list_and_missing_files(refcoco):
    home = refcoco(dict(a=1))
    assert "not a list" in sentence(open_data, home, "val")
    assert len(check_data(home).broken) == 1
    (home / "instances.json").write_text("{}")
    assert "annotations" in sentence(
        open_data, refcoco([ref()]) and (home / "instances.json").write_text("{}") and home, "val"
    )
    (home / "instances.json").unlink()
    assert "instances.json" in sentence(open_data, home, "val")


def test_refcoco_without_images(refcoco):
    home = refcoco([ref()])
    for p in (home / "images").iterdir():
        p.unlink()
    assert "does not exist" in sentence(open_data(home, "testA").__getitem__, 0)
    (home / "images").rmdir()
    assert "train2014" in sentence(open_data, home, "testA")
    assert len(check_data(home).broken) == 1


def test_a_forged_cache_leads_nowhere(refcoco):
    home = refcoco([ref()])
    open_data(home, "testA")
    stamp = (home / "refs(unc).jsonl").read_text().splitlines()[0]
    forged = [
        dict(id=1, split="testA", image="../../../etc/passwd", segmentation=[], sentences=["x"]),
        [],
        dict(split=5),
        dict(broken=5),
        7,
    ]
    (home / "refs(unc).jsonl").write_text("\n".join([stamp, *map(json.dumps, forged), "{"]))
    data = open_data(home, "testA")
    assert len(data) == 6
    assert "leads out" in sentence(data.__getitem__, 0)
    for i in range(1, 6):
        with pytest.raises(BrokenRecord):
            data[i]


# one's own


def test_own_folder_by_hand(own):
    white = encoded((DISC * 255).astype(np.uint8))
    home = own(
        dict(mask=encode_rle(DISC)),
        dict(polygon=BOX, tags=dict(kind="box", n=3)),
        dict(mask="m.png"),
        dict(mask=[encode_rle(DISC), "m.png"], polygon=[BOX, BOX]),
        dict(mask=[]),
        dict(mask=encode_rle(DISC), ignore="m.png"),
        dict(mask=dict(size=[H, W], counts=[0, W * H])),
        m=white,
    )
    a, b, c, d, e, f, g = open_data(home, "all")
    assert np.array_equal(a.mask, DISC)
    assert b.mask.sum() == 16 * 11
    assert b.tags == dict(kind="box", n=3)
    assert np.array_equal(c.mask, DISC)
    assert len(d.targets) == 4
    assert e.targets == ()
    assert np.array_equal(f.ignore, DISC)
    assert g.mask.all()
    assert np.array_equal(a.image, PHOTO)


@pytest.mark.parametrize(
    "mode, white", [("1", True), ("L", 1), ("L", 255), ("I;16", 1), ("RGB", 255), ("P", 1)]
)
def test_masks_of_every_mode(own, mode, white):
    if mode == "RGB":
        image = Image.fromarray(np.repeat((DISC * 255).astype(np.uint8)[..., None], 3, 2))
    elif mode == "P":
        image = Image.fromarray(DISC.astype(np.uint8), "L").convert("P")
        image.putpalette([0, 0, 0, 128, 0, 0])
    else:
        image = Image.fromarray(
            (DISC * white).astype({"1": bool, "L": np.uint8, "I;16": np.uint16}[mode])
        )
    out = io.BytesIO()
    image.save(out, "PNG")
    assert np.array_equal(open_data(own(dict(mask="m.png"), m=out.getvalue()), "all")[0].mask, DISC)


def test_splits_of_ones_own(own):
    home = own(dict(mask=[], split="train"), dict(mask=[], split="val"), dict(mask=[], split="val"))
    assert [[s.id for s in open_data(home, split)] for split in ("train", "val")] == [
        ["r0"],
        ["r1", "r2"],
    ]
    assert open_data(home, "val").split_note is None
    assert "use one of train, val" in sentence(open_data, home, "test")
    assert "use one of train, val" in sentence(open_data, home, "test", limit=1)


@pytest.mark.parametrize(
    "record, words",
    [
        (dict(masks=[]), 'field "masks" is unknown'),
        (dict(), 'field "mask" is missing'),
        (dict(mask=[], image="images/b.png"), "does not exist"),
        (dict(mask=[], image="../a.png"), 'field "image" leads out'),
        (dict(mask=[], image="/etc/passwd"), "leads out"),
        (dict(mask=[], image="images/../../a.png"), "leads out"),
        (dict(mask=[], image="..\\a.png"), "leads out"),
        (dict(mask=[], image="C:\\a.png"), "leads out"),
        (dict(mask=[], image="\0"), "does not exist"),
        (dict(mask=[], image="images"), "is no file"),
        (dict(mask="../m.png"), "leads out"),
        (dict(mask="m.jpg"), "no PNG"),
        (dict(mask=".png"), "does not exist"),
        (dict(mask="m.png"), "is (30, 40) beside"),
        (dict(mask=""), "no PNG"),
        (dict(mask=[None]), "mask[0]"),
        (dict(mask=5), "size"),
        (dict(mask=encode_rle(DISC.T)), "size"),
        (dict(mask=encode_rle(DISC) | dict(counts="0")), "add up"),
        (dict(mask=encode_rle(DISC & False)), "no pixel"),
        (dict(polygon=[[1, 1], [2, 2]]), "2 points"),
        (dict(polygon=[BOX, [[1, 1], [2, 2]]]), "polygon[1]"),
        (dict(polygon=[[100, 100], [110, 100], [100, 110]]), "no pixel"),
        (dict(polygon=[[1, 1, 1], [2, 2, 2], [3, 3, 3]]), "polygon is not"),
        (dict(polygon="x"), "polygon"),
        (dict(mask=[], tags=[]), 'field "tags"'),
        (dict(mask=[], tags=dict(a=[])), 'field "tags"'),
        (dict(mask=[], query=""), 'field "query"'),
        (dict(mask=[], id=5), 'field "id"'),
        ("{", "JSON"),
        ("[]", "object"),
        ("5", "object"),
    ],
)
def test_broken_records_of_ones_own_are_told(own, record, words):
    home = own(dict(mask=[]), record, m=encoded(PHOTO.transpose(1, 0, 2)))
    data = open_data(home, "all")
    told = sentence(data.__getitem__, 1)
    assert "data.jsonl:2" in told
    assert words in told
    assert data[0].id == "r0"
    assert check_data(home).broken == (told,)


def test_own_data_is_utf8(own):
    home = own(dict(mask=[]))
    (home / "data.jsonl").write_bytes('{"id": "é"}'.encode("cp1252"))
    assert "save it as UTF-8" in sentence(open_data(home, "all").__getitem__, 0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-100, 100) | st.floats() | st.text(max_size=8),
    lambda s: (
        st.lists(s, max_size=4)
        | st.dictionaries(st.sampled_from(["size", "counts", "a"]), s, max_size=3)
    ),
    max_leaves=8,
)


@given(st.sampled_from(FOLDER_FIELDS), json_values)
def test_any_value_in_any_field_is_read_or_told(tmp_path_factory, field, value):
    home = tmp_path_factory.getbasetemp() / "any"
    home.mkdir(exist_ok=True)
    (home / "a.png").write_bytes(encoded())
    (home / "data.jsonl").write_text(
        json.dumps(dict(id="a", image="a.png", query="q", mask=[]) | {field: value})
    )
    report = check_data(home)
    assert len(report.broken) + sum(c["samples"] for c in report.splits.values()) == 1


# opening and checking


def test_sequences_behave(own):
    data = open_data(own(*[dict(mask=[])] * 3), "all")
    assert len(data) == 3
    assert data[-1].id == "r2"
    assert data[np.int64(1)].id == "r1"
    assert [s.id for s in data] == ["r0", "r1", "r2"]
    with pytest.raises(IndexError):
        data[3]
    assert len(pickle.loads(pickle.dumps(data))) == 3  # a worker gets it
    assert [s.id for s in open_data(own(*[dict(mask=[])] * 3), "all", limit=2)] == ["r0", "r1"]
    assert "limit" in sentence(open_data, own(dict(mask=[])), "all", limit=0)


def test_what_is_no_data_set_is_told(tmp_path, own):
    assert "no known data set" in sentence(open_data, tmp_path, "val")
    assert "no known data set" in sentence(check_data, tmp_path)
    assert "does not exist" in sentence(open_data, tmp_path / "nothing", "val")
    assert 'option "level"' in sentence(open_data, own(dict(mask=[])), "val", level="instance")
    (tmp_path / "data.jsonl").write_text("")
    assert "no samples" in sentence(open_data, tmp_path, "val")


def test_a_hub_name_is_found_in_the_cache(tmp_path, monkeypatch):
    "Laid out as huggingface_hub does, links into blobs and all; there is no network."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--Ricky06662--ReasonSeg_val"
    blob = parquet(repo / "blobs" / "abc", [hub_row()])
    data = repo / "snapshots" / ("0" * 40) / "data"
    data.mkdir(parents=True), (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    (data / "test-00000-of-00001.parquet").symlink_to(blob)
    assert open_data("Ricky06662/ReasonSeg_val", "val")[0].query == "thing 0"
    assert "not to be had from the hub" in sentence(open_data, "Ricky06662/ReasonSeg_test", "val")


def test_report_reads_well(reasonseg, own, tmp_path):
    root = reasonseg("a", [shape(BOX)], root=tmp_path / "below" / "rs")
    assert str(check_data(root)).splitlines()[1:] == [
        "val: 1 samples, 1 images, 1 targets, 0 without targets, 0 with ignore",
        "nothing broken",
    ]
    seen = []
    check_data(root, lambda *a: seen.append(a))
    assert seen == [("val", 1, 1)]
    report = check_data(own(dict(id="same", mask=[]), dict(id="same", mask=[])))
    assert len(report.broken) == 1
    assert 'id "same"' in report.broken[0]
    assert str(report).endswith(report.broken[0])


def test_memory_does_not_grow(own):
    "A thousand samples pass; what stays is less than one of their images."
    import tracemalloc

    data = open_data(own(*[dict(mask=[])] * 1000), "all")
    data[0]
    tracemalloc.start()
    for _ in data:
        pass
    del _
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < PHOTO.nbytes * 20


# a set without splits is divided


def place(name):
    "The rule, written again: the hash of an image's name as a fraction."
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256


@pytest.fixture
def unsplit(own):
    "A function that writes a folder of one's own without splits: questions about so many images."

    def write(images, questions=2):
        home = own(
            *[
                dict(mask=[], image=f"images/{k}.png", query=f"thing {q}")
                for k in range(images)
                for q in range(questions)
            ]
        )
        for k in range(images):
            (home / "images" / f"{k}.png").write_bytes(encoded(PHOTO + np.uint8(k)))
        return home

    return write


def images_of(data):
    return {image for _, image, _ in data.iter_questions()}


def test_a_tenth_of_the_images_is_held_out(unsplit):
    home = unsplit(60)
    train, val, test, every = (open_data(home, s) for s in ("train", "val", "test", "all"))
    held = {f"images/{k}.png" for k in range(60) if place(f"images/{k}.png") < 0.1}
    assert 0 < len(held) < 15
    assert images_of(val) == held
    assert images_of(train) == {f"images/{k}.png" for k in range(60)} - held
    assert list(test.iter_questions()) == list(val.iter_questions())
    sides = [*train.iter_questions(), *val.iter_questions()]
    assert sorted(sides) == sorted(every.iter_questions())
    assert (len(every), every.split_note) == (120, None)
    assert train.split_note == val.split_note
    assert f"{2 * len(held)} of 120 records are held out" in val.split_note
    assert f"{val.split_note}." in check_data(home).remarks
    assert dataset_info(val, "mine", "val")["split_note"] == val.split_note
    assert "use one of train, val, test, all" in sentence(open_data, home, "testA")


def test_new_images_do_not_move_the_old(unsplit):
    before = [images_of(open_data(unsplit(30), s)) for s in ("train", "val")]
    after = [images_of(open_data(unsplit(60), s)) for s in ("train", "val")]
    assert before[0] < after[0]
    assert before[1] <= after[1]


@pytest.mark.parametrize("images", [2, 3, 5])
def test_each_side_has_an_image(unsplit, images):
    train, val = (images_of(open_data(unsplit(images), s)) for s in ("train", "val"))
    assert train
    assert val
    assert not train & val
    assert len(train | val) == images


def test_one_image_cannot_be_divided(unsplit):
    home = unsplit(1)
    told = sentence(open_data, home, "val")
    assert "one image alone" in told
    assert told in check_data(home).remarks
    assert len(open_data(home, "train")) == len(open_data(home, "all")) == 2


@given(st.lists(st.text(st.characters(), min_size=1), min_size=1, unique=True))
def test_any_names_are_divided(names):
    def records():
        return zip(names, range(len(names)))

    if len(names) == 1:
        sentence(divide_held_out, records, "val", None, "x")
        return
    train, val = (divide_held_out(records, s, None, "x")[0] for s in ("train", "val"))
    assert train
    assert val
    assert sorted(train + val) == list(range(len(names)))
    for limit in 1, 2:
        for s, whole in ("train", train), ("val", val):
            assert divide_held_out(records, s, limit, "x")[0] == whole[:limit]


def test_a_split_in_every_record_or_in_none(own):
    home = own(dict(mask=[], split="train"), dict(mask=[]), dict(mask=[], split="val"))
    assert 'data.jsonl:2: field "split" is missing' in sentence(
        open_data(home, "val").__getitem__, 0
    )
    assert len(check_data(home).broken) == 1
    home = own(dict(mask=[]), dict(mask=[], split="val"))
    assert "name a split in every record or in none" in sentence(
        open_data(home, "all").__getitem__, 1
    )
    assert len(check_data(home).broken) == 1


def test_a_folder_of_reasonseg_without_splits(reasonseg, tmp_path):
    for k in range(20):
        root = reasonseg(f"n{k}", text=("a", "b"), split="mine", root=tmp_path)
    train, val = open_data(root / "mine", "train"), open_data(root / "mine", "val")
    held = {f"n{k}" for k in range(20) if place(f"n{k}") < 0.1} or {
        min((f"n{k}" for k in range(20)), key=place)
    }
    assert images_of(val) == held
    assert len(train) == 2 * (20 - len(held))
    assert len(val) == len(held)
    assert "of 20 records are held out" in train.split_note
    assert len(open_data(root / "mine", "all")) == 20
    assert (
        len(open_data(root / "mine", "train", limit=3))
        == 3
        == len(open_data(root / "mine", "train", limit=3, texts=1))
    )


def test_a_parquet_file_without_a_split(tmp_path):
    rows = [hub_row(k, image_id=f"im{k // 2}") for k in range(30)]
    file = parquet(tmp_path / "mine.parquet", rows, row_group_size=4)
    train, val = open_data(file, "train"), open_data(file, "val")
    held = {f"im{k}" for k in range(15) if place(f"im{k}") < 0.1} or {
        min((f"im{k}" for k in range(15)), key=place)
    }
    assert images_of(val) == held
    assert not images_of(train) & held
    assert len(train) + len(val) == 30 == len(open_data(file, "all"))
    assert [s.query for s in val] == [f"thing {k}" for k in range(30) if f"im{k // 2}" in held]
    assert "records are held out, chosen by a hash of their image_id, path or id" in val.split_note


@pytest.mark.parametrize("label", ["path", "id"])
def test_training_rows_are_divided_by_path_or_id(tmp_path, label):
    def row(k):
        return training_row("[]", id=f"q{k}") | dict(
            image=dict(bytes=encoded(), path=f"p{k // 2}.png" if label == "path" else None)
        )

    file = parquet(tmp_path / "mine.parquet", [row(k) for k in range(24)])
    names = [f"p{k // 2}.png" if label == "path" else f"q{k}" for k in range(24)]
    held = {n for n in names if place(n) < 0.1} or {min(names, key=place)}
    assert images_of(open_data(file, "val")) == held
    assert images_of(open_data(file, "train")) == set(names) - held


def test_a_parquet_file_named_for_its_split_has_that_alone(tmp_path):
    file = parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [training_row("[]")])
    assert open_data(file, "train").split_note is None
    assert "use one of train" in sentence(open_data, file, "val")
    parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", [training_row("[]", id="v")])
    assert (
        [s.id for s in open_data(tmp_path, "val")]
        == ["v"]
        == [s.id for s in open_data(tmp_path, "validation")]
    )


def test_pictures_that_splits_share_are_told(own, tmp_path):
    home = own(
        dict(mask=[], split="train"),
        dict(mask=[], split="val", image="images/b.png"),
        dict(mask=[], split="val", image="images/c.png"),
    )
    (
        (home / "images" / "b.png").write_bytes(encoded()),
        (home / "images" / "c.png").write_bytes(encoded(255 - PHOTO)),
    )
    (remark,) = check_data(home).remarks
    assert remark == "train and val have 1 of the same pictures, such as images/a.png."
    assert remark in str(check_data(home))


# what was trained on is not held out


def test_the_same_question_about_the_same_image_is_found(own, tmp_path):
    home = own(
        dict(mask=[], split="train"),
        dict(mask=[], split="train", query="Other."),
        dict(id="v", mask=[], split="val", query="OTHER"),
    )
    train, val = open_data(home, "train"), open_data(home, "val")
    told = sentence(check_disjoint, train, val)
    assert 'sample "v" of the evaluation is sample "r1" of the training' in told
    assert "allow_overlap" in told
    check_disjoint(open_data(home, "train", limit=1), val)  # another question about the same image
    assert "r0" in sentence(check_disjoint, train, train)


def test_names_alone_are_no_overlap(own, tmp_path):
    "Two folders, each with an images/a.png and the same question: it depends on the pictures."
    one, two = own(dict(mask=[])), tmp_path / "two"
    (two / "images").mkdir(parents=True)
    (two / "data.jsonl").write_bytes((one / "data.jsonl").read_bytes())
    (two / "images" / "a.png").write_bytes(encoded(255 - PHOTO))
    check_disjoint(open_data(one, "all"), open_data(two, "all"))
    (two / "images" / "a.png").write_bytes(encoded())
    assert 'sample "r0"' in sentence(check_disjoint, open_data(one, "all"), open_data(two, "all"))
    (two / "images" / "a.png").unlink()
    check_disjoint(open_data(one, "all"), open_data(two, "all"))


def test_every_reader_tells_what_it_asks(reasonseg, refcoco, tmp_path):
    root = reasonseg("a", text=("one", "two"), split="train", root=tmp_path / "rs")
    questions = [("a", "a", "one"), ("a#1", "a", "two")]
    assert list(open_data(root, "train").iter_questions()) == questions
    home = refcoco([ref(), ref(2, split="val")])
    assert list(open_data(home, "testA", level="expression").iter_questions()) == [
        (f"1#{k}", "COCO_train2014_000000000007.jpg", q)
        for k, q in enumerate(["the cup", "left thing"])
    ]
    file = parquet(tmp_path / "test-00000-of-00001.parquet", [hub_row(), hub_row(1, text=" ")])
    assert list(open_data(file, "test").iter_questions()) == [("7-0-0", "7", "thing 0"), None]
    for data in open_data(root, "train"), open_data(home, "val"), open_data(file, "test"):
        assert "the same question about the same image" in sentence(check_disjoint, data, data)
    assert 'sample "1"' in sentence(
        check_disjoint, open_data(home, "val"), open_data(home, "testA")
    )
    check_disjoint(open_data(home, "val"), open_data(root, "train"))


def test_no_picture_is_decoded_to_compare(own, monkeypatch):
    home = own(dict(mask=[], split="train"), dict(mask=[], split="val"))
    monkeypatch.setattr(
        "dr2seg_lib.data.folder.open_picture", lambda *a, **k: pytest.fail("decoded")
    )
    assert "r0" in sentence(check_disjoint, open_data(home, "train"), open_data(home, "val"))
    check_disjoint(MiniReasonSeg("train", 2), open_data(home, "val"))


# opening reads no more than it must


@pytest.fixture
def counted(monkeypatch):
    "How often JSON is parsed."
    calls, real = [], parse_json
    for module in "folder", "jsonl", "reasonseg", "refcoco":
        monkeypatch.setattr(
            f"dr2seg_lib.data.{module}.parse_json", lambda *a, **k: calls.append(1) or real(*a, **k)
        )
    return calls


@pytest.mark.parametrize("split", ["train", "val", "all"])
@pytest.mark.parametrize("named", [True, False])
def test_a_limit_is_reached_without_the_rest(own, counted, named, split):
    rows = [
        dict(mask=[], image=f"images/{k}.png")
        | (dict(split=("train", "val")[k % 2]) if named else {})
        for k in range(3000)
    ]
    home = own(*rows)
    if named and split == "all":
        return
    data = open_data(home, split, limit=1)
    assert len(data) == 1
    assert len(counted) < 300


def test_reasonseg_and_refcoco_reach_a_limit_without_the_rest(reasonseg, refcoco, counted):
    for k in range(30):
        root = reasonseg(f"n{k:02}", text=("a", "b"), split="train")
    assert len(open_data(root, "train", limit=3)) == 3
    assert len(counted) == 2
    for seed in range(9):
        assert (
            open_data(root, "train", texts=seed, limit=3).index
            == open_data(root, "train", texts=seed).index[:3]
        )
    home = refcoco([ref(k) for k in range(200)])
    open_data(home, "testA")
    counted.clear()
    assert len(open_data(home, "testA", limit=2)) == 2
    assert len(counted) < 5


# check


def test_questions_with_special_tokens_are_remarked(own):
    home = own(
        dict(mask=[], query="the <|image_pad|><|image_pad|> and <|im_end|>"),
        dict(mask=[], query="a <|b", tags=dict(x="<|im_end|>")),
    )
    report = check_data(home)
    (remark,) = [r for r in report.remarks if "as text" in r]
    assert not report.broken
    assert '"r0"' in remark
    assert "<|im_end|>, <|image_pad|>" in remark
    assert remark in str(report)


def test_questions_that_are_too_long_are_broken(own):
    home = own(
        dict(mask=[], query="word " * 512),
        dict(mask=[], query="word " * 513),
        dict(mask=[], query="x" * 100_000),
    )
    told = check_data(home).broken
    assert len(told) == 2
    assert '"r1"' in told[0]
    assert "513 tokens" in told[0]
    assert "12,500 tokens" in told[1]
    assert "max_question_tokens" in told[0]
    assert check_data(home, count_tokens=len).broken[0].count("2,560 tokens") == 1


def test_a_report_has_an_end(own, monkeypatch):
    monkeypatch.setattr("dr2seg_lib.data.checking.MAX_SENTENCES", 5)
    broken = check_data(own(*["{"] * 20)).broken
    assert len(broken) == 6
    assert broken[-1] == "There are 15 more like these; mend these first."


# hostile data ends in a sentence, in time, within bounds


@pytest.fixture
def soon():
    "A few seconds of computing, on any machine."
    began = time.process_time()
    yield
    assert time.process_time() - began < 20


def zigzag(n, reach=32766.0, width=20):
    return [v for k in range(n) for v in (k * width / n, reach if k % 2 else -reach)]


@pytest.mark.parametrize(
    "segmentation, words",
    [
        ([zigzag(20_000)], "pixels of outline"),
        ([zigzag(300)], "pixels of outline"),
        ([zigzag(200_000)], "points"),
        ([zigzag(50_000, 20.0)], "pixels of outline"),
        ([zigzag(4, 10)] * 2000, "2,000 polygons"),
        ([zigzag(16)] * 300, "pixels of outline"),
        ([[0.0, 0.0] * 70_000] * 2, "points"),
    ],
    ids=range(7),
)
def test_polygons_that_would_break_cocos_code(soon, segmentation, words):
    assert words in sentence(coco_mask, segmentation, (20, 10), "f")


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-60, 120), st.floats(-60, 100)), min_size=3, max_size=30),
        min_size=1,
        max_size=4,
    )
)
def test_polygons_that_stick_out_are_cocos_own(polygons):
    flat = [[float(v) for p in polygon for v in p] for polygon in polygons]
    assert np.array_equal(
        coco_mask(flat, (W, H), "f"),
        coco.decode(coco.merge(coco.frPyObjects(flat, H, W))).astype(bool),
    )


def painted_plainly(polygons, values, size):
    "As it was before: the area of each on a whole canvas of its own."

    def draw(canvas, points, value):
        return cv2.fillPoly(cv2.polylines(canvas, [points], True, value, 1), [points], value)

    blank = np.zeros(size[::-1], np.uint8)
    areas = [draw(blank.copy(), p, 1).sum() for p in polygons]
    for i in np.argsort(areas)[::-1]:
        draw(blank, polygons[i], values[i])
    return blank, areas


@given(
    st.lists(
        st.lists(st.tuples(st.integers(-90, 120), st.integers(-90, 120)), min_size=3, max_size=9),
        max_size=5,
    )
)
def test_painting_is_what_it_was(polygons):
    arrays = [np.array(p, np.int32) for p in polygons]
    values = list(range(1, len(arrays) + 1))
    assert np.array_equal(
        paint_polygons(arrays, values, (W, H)), painted_plainly(arrays, values, (W, H))[0]
    )


def test_fine_outlines_are_drawn(soon):
    "Every border pixel of a crooked thing in a photo of 12 million pixels."
    y, x = np.mgrid[:3000, :4000]
    r, a = np.hypot(x - 2000, y - 1500), np.arctan2(y - 1500, x - 2000)
    thing = (r < 1200 + 150 * np.sin(90 * a)).astype(np.uint8)
    contour = max(cv2.findContours(thing, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0], key=len)[
        :, 0
    ]
    assert len(contour) > 20_000
    drawn = paint_polygons(
        check_drawable([parse_polygon(contour.tolist(), "f", "p")], (4000, 3000), "f", "p"),
        [1],
        (4000, 3000),
    )
    assert (drawn != thing).mean() < 1e-4
    assert (
        abs(
            coco_mask([contour.ravel().astype(float).tolist()], (4000, 3000), "f").mean()
            - thing.mean()
        )
        < 5e-3
    )  # it fills between the pixels' corners


def comb(n, height=20):
    return [[k * 7919 % 32_000, (height - 1) * (k % 2)] for k in range(n)]


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(polygon=[[k, k % 2] for k in range(200_000)]), "200,000 points"),
        (dict(polygon=comb(60_000)), "outline"),
        (dict(polygon=[BOX] * 5000), "5,000 objects"),
        (dict(polygon=[[[0, 0], [32000, 0], [0, 32000]]] * 100), "outline"),
        (dict(mask=[encode_rle(DISC)] * 1001), "1,001 objects"),
        (dict(tags={f"t{k}": 1 for k in range(65)}), "65 tags"),
        (dict(tags=dict(a="x" * 1001)), "tags"),
        (dict(tags=dict(a=float("nan"))), "tags"),
        (dict(tags=dict(a=float("inf"))), "tags"),
        (dict(tags={"\ud800": 1}), "tags"),
        (dict(tags=dict(a="\udfff")), "tags"),
        (dict(id="x" * 1001), "characters"),
        (dict(id="\ud800"), "half of a character"),
        (dict(query="\udc00?"), "half of a character"),
        (dict(image="a\ud83d.png"), "half of a character"),
        (dict(id=float("nan")), 'field "id"'),
        (dict(mask=dict(size=[H, W], counts="?" * 3_000_000)), "add up"),
        (dict(mask=dict(size=[H, W], counts=[0] * 3_000_000)), "add up"),
        (dict(mask=dict(size=[H, W], counts=[10**4000])), "add up"),
        (dict(mask=dict(size=[10**9, 10**9], counts=[10**18])), "size"),
        (dict(query="x" * 2**24), "longer than"),
        ('{"id": "a", "id": "b"}', "'id' is there twice"),
        ('{"id": ' + "[" * 200_000, "cannot be parsed"),
        ('{"id": ' + '{"a": ' * 200_000, "cannot be parsed"),
        ('{"id": ' + "9" * 5_000_000 + "}", "cannot be parsed"),
        ('{"id": 1.' + "9" * 5_000_000 + "}", 'field "id"'),
        ('{"a": [' + "[]," * 5_000_000 + "[]]}", "more than 524,288 lists"),
        ('{"\\u001b[2J\\n": 1, "id": "a", "image": "images/a.png", "query": "q"}', "\\x1b[2J"),
        ("x" * 50_000_000, "longer than"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_hostile_records_of_ones_own(own, soon, change, words):
    record = (
        change
        if isinstance(change, str)
        else {
            k: v
            for k, v in (dict(mask=[]) | change).items()
            if "polygon" not in change or k != "mask"
        }
    )
    home = own(dict(mask=[]), record)
    data = open_data(home, "all")
    told = sentence(data.__getitem__, 1)
    assert words in told
    assert len(told) < 1500
    assert told.isprintable()
    assert data[0].id == "r0"
    assert told in check_data(home).broken


def test_an_image_of_many_large_masks(own, monkeypatch):
    whole = dict(size=[H, W], counts=[0, W * H])
    monkeypatch.setattr("dr2seg_lib.data.folder.MAX_BOXED", 5 * W * H)
    home = own(dict(mask=[whole] * 5), dict(mask=[whole] * 6))
    assert len(open_data(home, "all")[0].targets) == 5
    assert "too many pixels" in sentence(open_data(home, "all").__getitem__, 1)
    monkeypatch.setattr("dr2seg_lib.data.folder.MAX_DRAWN", 4 * W * H)
    assert "give at most 4" in sentence(open_data(home, "all").__getitem__, 0)


@pytest.mark.parametrize(
    "change",
    [
        dict(shapes=[shape(BOX)] * 1001),
        dict(shapes=[shape([[k, k % 2] for k in range(200_000)])]),
        dict(shapes=[shape(comb(60_000))]),
        dict(shapes=[shape([[0, 0], [32000, 0], [0, 32000]])] * 100),
        dict(text=["x" * 2**24]),
    ],
    ids=range(5),
)
def test_hostile_reasonseg(reasonseg, soon, change):
    root = reasonseg("a", **change)
    assert "a.json" in sentence(ReasonSegDataset(root, "val").__getitem__, 0)


def test_a_file_without_an_end_of_line(own, soon):
    home = own(dict(mask=[]), "x" * 40_000_000, dict(mask=[]))
    data = open_data(home, "all")
    assert len(data) == 3
    assert data[2].id == "r2"
    assert "data.jsonl:2" in sentence(data.__getitem__, 1)


nested = (
    b"N" + b"\x85" * 200_000
)  # a tuple in a tuple in a tuple: to hash it, C calls itself as often
PICKLES = dict(
    memo_binary=b"]r\xff\xff\xff\x7f.",
    memo_unsigned=b"]r\xff\xff\xff\xff.",
    memo_text=b"]p2147483647\n.",
    memo_huge=b"]p" + b"9" * 100_000 + b"\n.",
    get=b"g99999999999\n.",
    text=b"X\xff\xff\xff\x7fa.",
    text8=b"\x8d" + b"\xff" * 7 + b"\x7fa.",
    bytearray8=b"\x96" + b"\xff" * 6 + b"\0\0a.",
    frame=b"\x80\x04\x95" + b"\xff" * 8 + b"].",
    long4=b"\x8b\xff\xff\xff\x7f1.",
    number=b"L" + b"9" * 4000 + b"L\n.",
    long1=b"\x8a\xff" + b"\x7f" * 255 + b".",
    deep_key=b"}" + nested + b"K\x01s.",
    sets=b"\x8f" * 2000 + b".",
    lists=b"(" * 20_000_000 + b"l" * 20_000_000 + b".",
    ext=b"\x82\x01.",
    persistent=b"Pid\n.",
    build=b"}}b.",
    cut=b"(((",
    empty=b"",
    no_name=b"cos",
    no_stop=b"]",
    pop=b"0.",
    mark=b"a.",
    negative_text=b"T\xff\xff\xff\xffa.",
    line=b"S" + b"a" * 1_000_000,
)


@pytest.mark.parametrize("name", PICKLES)
def test_hostile_pickles(refcoco, soon, name):
    home = refcoco(PICKLES[name])
    told = sentence(open_data, home, "val")
    assert "refs(unc).p" in told
    assert len(told) < 1500
    assert told.isprintable()
    assert check_data(home).broken == (told,)


def test_a_pickle_may_not_say_more_than_it_has(refcoco, monkeypatch, soon):
    "A reference that is there a thousand times by its memo's place is written out each time."
    one = ref(sents=["x" * 1000])
    monkeypatch.setattr("dr2seg_lib.data.refcoco.MAX_TABLE", 500_000)
    assert len(open_data(refcoco([one] * 100), "testA")) == 100
    home = refcoco([one] * 1000, protocol=4)
    (home / "refs(unc).jsonl").unlink()
    assert (home / "refs(unc).p").stat().st_size < 10_000
    assert "says more than" in sentence(open_data, home, "testA")
    assert not list(home.glob("*.jsonl*"))
    assert not list(home.glob(".*"))


def test_ids_that_fall_on_one_another(refcoco, soon):
    "Python hashes integers modulo 2^61 - 1: in a table of its multiples each is searched for."
    home = refcoco([ref()])
    told = json.loads((home / "instances.json").read_text())
    told["annotations"] += [
        dict(id=k * (2**61 - 1), image_id=7, segmentation=[]) for k in range(1, 100_000)
    ]
    (home / "instances.json").write_text(json.dumps(told))
    assert open_data(home, "testA")[0].query == "the cup"


def test_a_pickle_of_the_size_of_refcoco(tmp_path):
    "Looking at it first costs less than loading it."
    words = [f"word{k}" for k in range(3000)]
    refs = [
        ref(
            k,
            k,
            "train",
            [" ".join(words[(7 * k + 3 * j + i) % 3000] + "" for i in range(5)) for j in range(3)],
        )
        for k in range(8000)
    ]
    for protocol in 0, 2, 4:
        data = pickle.dumps(refs, protocol=protocol)
        began = time.process_time()
        pickle.loads(data)
        loaded = time.process_time()
        assert scan_pickle(data, "f") is data
        assert time.process_time() - loaded < 2 * (loaded - began) + 0.5
        (tmp_path / "refs.p").write_bytes(data)
        assert load_plain_pickle(tmp_path / "refs.p") == refs


def test_a_parquet_file_that_unfolds(tmp_path, monkeypatch, soon):
    "A picture of 4 MB that a dictionary repeats 5,000 times, in a file of 200 kB."
    repeated = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(5000, np.int32)), pa.array([bytes(4_000_000)])
    )
    file = tmp_path / "bomb.parquet"
    pq.write_table(
        pa.table(dict(image=repeated, problem=["q"] * 5000, solution=["[]"] * 5000)),
        file,
        dictionary_pagesize_limit=2**30,
        store_schema=False,
    )
    assert file.stat().st_size < 500_000
    monkeypatch.setattr("dr2seg_lib.data.row_groups.MAX_GROUP", 2**28)
    data = open_data(file, "all")
    assert "row group 0" in sentence(data.__getitem__, 0)


def test_parquet_files_that_lie(tmp_path):
    file = tmp_path / "twice.parquet"
    row = hub_row()
    pq.write_table(
        pa.table(
            [pa.array([row["text"]]), pa.array([row["text"]]), pa.array([row["image"]])],
            names=["text", "text", "image"],
        ),
        file,
    )
    assert "two columns of one name" in sentence(open_data, file, "all")
    monstrous = parquet(tmp_path / "rows.parquet", [hub_row()])

    class Layout:
        schema_arrow, num_row_groups = pq.read_schema(monstrous), 1

        class metadata:
            row_group = staticmethod(lambda g: type("Group", (), dict(num_rows=2**40)))

    assert "declares 1,099,511,627,776 rows" in sentence(read_layout, Layout, monstrous)
    os.mkfifo(tmp_path / "pipe.parquet")
    assert "is no file" in sentence(file_layout, tmp_path / "pipe.parquet")


@pytest.mark.parametrize("difficulty", [[1], dict(a=1), float("nan"), "x" * 2000, b"x"], ids=str)
def test_tags_of_the_hub_are_plain(tmp_path, difficulty):
    file = parquet(
        tmp_path / "train-00000-of-00001.parquet", [training_row("[]", difficulty=difficulty)]
    )
    assert "tags" in sentence(open_data(file, "train").__getitem__, 0)
    assert len(check_data(file).broken) == 1


def test_rows_without_an_id_have_their_number(tmp_path):
    file = parquet(
        tmp_path / "train-00000-of-00001.parquet",
        [training_row("[]", id=None), training_row("[]", id="x" * 2000)],
    )
    assert open_data(file, "train")[0].id == "0"
    assert "2,000 characters" in sentence(open_data(file, "train").__getitem__, 1)


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "a/" * 3000 + "b", "~nobody-of-that-name/x", "a\0b", "\x1b[2J", "\ud800"],
    ids=range(6),
)
def test_names_that_cannot_be(name):
    told = sentence(open_data, name, "val")
    assert told.isprintable()
    assert len(told) < 600
