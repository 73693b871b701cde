"Boxes and points in, masks out: the embedded SAM2, GrabCut, and segmenters that cannot be had."

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sam2.build_sam import build_sam2

from dr2seg_lib.cli import main
from dr2seg_lib.core.files import read_json
from dr2seg_lib.core.masks import iou, ratio
from dr2seg_lib.data.mini import SPLIT_SEEDS, WARM_START, draw_problem
from dr2seg_lib.data.samples import Target
from dr2seg_lib.data.scenes import SIDE
from dr2seg_lib.pretraining import precision
from dr2seg_lib.pretraining.segmenter import (
    decode_prompts,
    draw_batch,
    draw_prompt,
    jitter_prompt,
    object_ious,
    overlap_loss,
    segmenter_loss,
    train_sam2,
)
from dr2seg_lib.segmenters.base import Segmenter, clip_prompt
from dr2seg_lib.segmenters.grabcut import GrabCutSegmenter
from dr2seg_lib.segmenters.loading import EMBEDDED_SEGMENTER, load_segmenter
from dr2seg_lib.segmenters.sam2 import Sam2Segmenter, Sam2Size, save_sam2

VAL = SPLIT_SEEDS["val"][0]


def overlap(a, b):
    return ratio(*iou(a, b))


@pytest.fixture(scope="module")
def sam():
    return load_segmenter("embedded", device="cpu")


@pytest.fixture(scope="module", params=["embedded", "grabcut"])
def segmenter(request):
    return load_segmenter(request.param, device="cpu")


@pytest.fixture(scope="module")
def scene():
    s = draw_problem(VAL).scene
    return s.picture(), [Target.of(m) for m in s.masks()]


def test_embedded_on_held_out_scenes(sam):
    exact, off = (object_ious(sam, range(VAL + 100, VAL + 114), jitter=j) for j in (0, 4))
    assert len(exact) >= 60
    assert exact.mean() >= 0.9
    assert off.mean() >= 0.85
    assert (exact > 0.5).mean() > 0.98


def test_weights_are_small_and_half_precision():
    from safetensors.torch import load_file

    path = EMBEDDED_SEGMENTER / "model.safetensors"
    assert path.stat().st_size <= 20e6
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}


def test_masks_are_one_per_object_at_the_image_size(segmenter, scene):
    image, targets = scene
    masks = segmenter.masks(image, targets)
    assert len(masks) == len(targets)
    assert all(m.shape == image.shape[:2] and m.dtype == bool for m in masks)
    assert np.array_equal(segmenter.segment(image, targets), np.any(masks, axis=0))
    assert all(overlap(m, t.mask) > 0.5 for m, t in zip(masks, targets))


def test_objects_do_not_depend_on_their_company(sam, scene):
    "More than a batch of objects, in any order, gives the masks that each gives alone."
    image, targets = scene
    alone = [sam.masks(image, [t])[0] for t in targets]
    many = sam.masks(image, targets[::-1] * 8)
    assert len(many) == 8 * len(targets) > 16
    assert all(overlap(m, alone[::-1][i % len(targets)]) > 0.99 for i, m in enumerate(many))


def test_no_objects_no_mask(segmenter, scene):
    assert segmenter.masks(scene[0], []) == []
    mask = segmenter.segment(scene[0], [])
    assert mask.shape == (SIDE, SIDE)
    assert mask.dtype == bool
    assert not mask.any()


def test_image_that_is_not_square(segmenter, scene):
    "Coordinates are pixels of the image given, on either axis."
    image, targets = scene
    low = image[: SIDE - 40]
    whole = [t for t in targets if t.box[3] < SIDE - 48]
    assert whole
    for m, t in zip(segmenter.masks(low, whole), whole):
        assert m.shape == low.shape[:2]
        assert overlap(m, t.mask[: SIDE - 40]) > 0.5


def test_the_same_twice(segmenter, scene):
    a, b = (segmenter.segment(*scene) for _ in range(2))
    assert np.array_equal(a, b)


def test_box_over_the_edge_is_cut_to_the_frame(sam, scene):
    "A box that overshoots the image is the box that ends at its edge."
    image, targets = scene
    t = max(targets, key=lambda t: t.box[2])
    x1, y1, x2, y2 = t.box
    part = image[:, : (x1 + x2) // 2]
    over, cut = (
        sam.segment(part, [Target((x1, y1, x, y2), (x1 + 3, (y1 + y2) // 2))])
        for x in (x2, part.shape[1] - 1)
    )
    assert np.array_equal(over, cut)


wild = st.one_of(st.integers(-(10**6), 10**6), st.floats(width=32), st.just(10**400))


@given(
    st.tuples(wild, wild, wild, wild), st.tuples(wild, wild), st.integers(1, 50), st.integers(1, 50)
)
def test_in_frame_holds_any_prompt(box, point, w, h):
    (x1, y1, x2, y2), (x, y) = clip_prompt(Target(box, point), (w, h))
    assert 0 <= x1 <= x2 <= w - 1
    assert 0 <= y1 <= y2 <= h - 1
    assert 0 <= x <= w - 1
    assert 0 <= y <= h - 1


@given(st.tuples(*[st.integers(0, 49)] * 4), st.tuples(*[st.integers(0, 49)] * 2))
def test_in_frame_leaves_a_good_prompt_alone(box, point):
    x1, x2, y1, y2 = *sorted(box[::2]), *sorted(box[1::2])
    assert clip_prompt(Target((x1, y1, x2, y2), point), (50, 50)) == ((x1, y1, x2, y2), point)


BOXES = [
    (-50, -50, 400, 900),
    (0, 0, 223, 223),
    (100, 100, 100, 100),
    (0, 0, 0, 0),
    (150, 90, 80, 30),
    (500, 500, 600, 600),
    (30.5, 40.2, 90.7, 80.1),
]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("point", [(110, 110), (-9, 1e6), (float("nan"), float("inf"))])
def test_meaningless_prompts_do_not_raise(segmenter, scene, box, point):
    assert segmenter.segment(scene[0], [Target(box, point)]).shape == (SIDE, SIDE)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(-20, 60)] * 4),
    st.tuples(*[st.integers(-20, 60)] * 2),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
)
def test_grabcut_takes_any_prompt_on_any_image(box, point, w, h, flat):
    image = (
        np.zeros((h, w, 3), np.uint8)
        if flat
        else np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8)
    )
    mask = GrabCutSegmenter().segment(image, [Target(box, point)])
    (x1, y1, x2, y2), _ = clip_prompt(Target(box, point), (w, h))
    outside = np.ones((h, w), bool)
    outside[y1 : y2 + 1, x1 : x2 + 1] = False
    assert mask.any()
    assert not (mask & outside).any()


def test_grabcut_on_scenes():
    assert object_ious(load_segmenter("grabcut"), range(VAL, VAL + 8)).mean() > 0.6


def test_grabcut_gives_the_box_when_there_is_nothing_to_find():
    grey = np.full((60, 80, 3), 128, np.uint8)
    mask = GrabCutSegmenter().segment(grey, [Target((0, 0, 79, 59), (40, 30))])
    assert mask.all()


def test_names():
    assert isinstance(load_segmenter("grabcut"), GrabCutSegmenter)
    assert isinstance(load_segmenter(device="cpu"), Sam2Segmenter)
    assert issubclass(GrabCutSegmenter, Segmenter)
    assert issubclass(Sam2Segmenter, Segmenter)


@pytest.mark.parametrize("name", ["sam9", "sam3", "", "weights.pt"])
def test_unknown_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is not known; use embedded, grabcut, a hub id") as e:
        load_segmenter(name)
    assert "\n" not in str(e.value)
    assert repr(name) in str(e.value)


@pytest.mark.parametrize(
    "file, text",
    [
        ("config.json", "{"),
        ("config.json", "{}"),
        ("config.json", '{"size": {"embed_dim": 16}}'),
        ("model.safetensors", "version https://git-lfs"),
    ],
    ids=str,
)
def test_a_folder_that_does_not_fit_is_one_sentence(file, text, tmp_path):
    shutil.copytree(EMBEDDED_SEGMENTER, tmp_path / "own")
    (tmp_path / "own" / file).write_text(text)
    with pytest.raises(
        ValueError,
        match=f"segmenter.* {tmp_path}/own.*("
        "cannot be loaded .*; take config.json and model.safetensors of one training"
        "|is no JSON object; restore it|describes no model; give a folder)",
    ) as e:
        load_segmenter(str(tmp_path / "own"))
    assert "\n" not in str(e.value)


def test_metas_checkpoint_is_one_sentence_where_it_is_none(tmp_path):
    file = tmp_path / "sam2.1_hiera_tiny.pt"
    file.write_bytes(b"no checkpoint")
    with pytest.raises(
        ValueError,
        match=f"segmenter {file} cannot be loaded .*; fetch Meta's checkpoint of that name again",
    ) as e:
        load_segmenter(str(file))
    assert "\n" not in str(e.value)


def test_a_hub_without_network_is_one_sentence(tmp_path, monkeypatch):
    "Nor does this machine hold the model."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError,
        match="segmenter facebook/sam2.1-hiera-tiny cannot be loaded .*connect to the hub",
    ) as e:
        load_segmenter("facebook/sam2.1-hiera-tiny")
    assert "\n" not in str(e.value)


def test_missing_files(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"sam2.1_hiera_tiny.pt is missing: .*facebook/sam2.1-hiera-tiny"
    ):
        load_segmenter(str(tmp_path / "sam2.1_hiera_tiny.pt"))
    for name in "config.json", "model.safetensors":
        folder = tmp_path / name
        shutil.copytree(EMBEDDED_SEGMENTER, folder)
        (folder / name).unlink()
        with pytest.raises(
            FileNotFoundError,
            match=f"{name} is missing: make the segmenter's weights with .*warmstart_segmenter",
        ) as e:
            load_segmenter(str(folder))
        assert str(folder / name) in str(e.value)
        assert "\n" not in str(e.value)


def test_a_checkpoint_of_metas_under_its_own_name(tmp_path):
    "Random weights of the real architecture stand in for the download, read as Meta's would be."
    torch.manual_seed(0)
    model = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu")
    torch.save({"model": model.state_dict()}, tmp_path / "sam2.1_hiera_tiny.pt")
    sam = load_segmenter(str(tmp_path / "sam2.1_hiera_tiny.pt"), device="cpu")
    assert sam.predictor._bb_feat_sizes == [(256, 256), (128, 128), (64, 64)]
    assert sam.predictor.model.image_size == 1024
    assert sam.segment(
        np.zeros((40, 60, 3), np.uint8),
        [Target((5, 5, 30, 30), (9, 9)), Target((1, 1, 9, 9), (4, 4))],
    ).shape == (40, 60)


def test_a_folder_is_written_and_read_back(tmp_path, sam, scene):
    size = Sam2Size(**json.loads((EMBEDDED_SEGMENTER / "config.json").read_text())["size"])
    save_sam2(sam.predictor.model, size, tmp_path / "made" / "here", steps=3)
    again = load_segmenter(str(tmp_path / "made" / "here"), device="cpu")
    assert np.array_equal(again.segment(*scene), sam.segment(*scene))
    assert json.loads((tmp_path / "made" / "here" / "config.json").read_text())["training"] == {
        "steps": 3
    }


# Training


def test_prompts_err_by_no_more_than_asked():
    rng, mask = np.random.default_rng(0), draw_problem(WARM_START).scene.masks()[0]
    true = Target.of(mask)
    errors = [np.abs(np.array(draw_prompt(mask, rng, jitter=4).box) - true.box) for _ in range(200)]
    assert np.max(errors) == 4
    assert 0.2 < np.mean([not e.any() for e in errors]) < 0.4
    same = jitter_prompt(true, rng, 0)
    assert same.box == true.box
    assert same.point == true.point
    assert same.mask is mask


def test_batch_has_the_objects_of_its_scenes():
    images, prompts = draw_batch([WARM_START, WARM_START + 1], np.random.default_rng(0), objects=2)
    assert len(images) == len(prompts) == 2
    assert all(len(some) == 2 for some in prompts)
    for image, seed in zip(images, (WARM_START, WARM_START + 1)):
        assert np.array_equal(image, draw_problem(seed).scene.picture())


def test_overlap_loss_prefers_the_truth():
    truth = torch.zeros(1, 20, 20)
    truth[:, 5:12, 6:15] = 1
    right, empty, full, inverse = (
        overlap_loss(s * 20, truth).item()
        for s in (truth * 2 - 1, truth * 0 - 1, truth * 0 + 1, 1 - truth * 2)
    )
    assert right < 1e-3 < min(empty, full)
    assert max(empty, full) < inverse


def test_only_the_best_mask_is_drawn_at_full_resolution():
    "The loss falls when one of three equal masks becomes right; the score learns the IoU."
    truth = torch.zeros(1, 32, 32)
    truth[:, 8:24, 8:24] = 1
    small = (
        torch.nn.functional.interpolate(truth[:, None], (8, 8), mode="area").expand(1, 3, 8, 8) * 20
        - 10
    )
    losses = []
    for right in range(4):
        logits = -small.clone()
        logits[:, :right] = small[:, :right]
        losses.append(segmenter_loss(logits, (torch.arange(3) < right).float()[None], truth).item())
    assert losses == sorted(losses, reverse=True)
    assert (
        losses[0] - losses[1] > 2 * (losses[1] - losses[2]) > 0
    )  # the first counts fully, the others by their share
    assert segmenter_loss(small, torch.zeros(1, 3), truth).item() == pytest.approx(
        losses[3] + 1, abs=1e-4
    )


def test_training_decodes_as_the_predictor_does(sam, scene):
    "The forward pass with gradients gives the masks of SAM2ImagePredictor."
    image, targets = scene
    model, predictor = sam.predictor.model, sam.predictor
    coords = (
        torch.tensor([[*t.box, *t.point] for t in targets], dtype=torch.float32).view(-1, 3, 2)
        * model.image_size
        / SIDE
    )
    with torch.no_grad():
        logits, scores = decode_prompts(
            model,
            predictor._transforms.forward_batch([image]),
            torch.zeros(len(targets), dtype=int),
            coords,
        )
    predictor.set_image(image)
    boxes, points = (
        np.array(v, dtype=np.float32) for v in zip(*((t.box, t.point) for t in targets))
    )
    _, want_scores, want = predictor.predict(points[:, None], np.ones((len(targets), 1)), box=boxes)
    np.testing.assert_allclose(scores.numpy(), want_scores, atol=1e-4)
    np.testing.assert_allclose(logits.clamp(-32, 32).numpy(), want, atol=2e-3)


TINY = Sam2Size(image_size=64, embed_dim=8, d_model=32, window_spec=(8, 4, 4, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_is_repeatable_and_learns(monkeypatch, dtype):
    "In either arithmetic of Muon, of which a probe chooses the faster."
    monkeypatch.setattr(precision, "probe_dtype", lambda: dtype)

    def figures(seed):
        rows = []
        model = train_sam2(
            TINY, steps=6, images=2, objects=2, seed=seed, log=lambda step, row: rows.append(row)
        )
        return rows, model.state_dict()

    (a, wa), (b, wb), (c, _) = figures(0), figures(0), figures(1)
    assert a == b
    assert all(torch.equal(wa[k], wb[k]) for k in wa)
    assert a != c
    assert [r["step"] for r in a] == list(range(1, 7))
    assert a[-1]["loss"] < a[0]["loss"]


def test_experiment_makes_a_segmenter(tmp_path):
    "The notebook that made the weights, two steps of it; the package's own weights are left alone."
    before = {p.name: p.read_bytes() for p in EMBEDDED_SEGMENTER.iterdir()}
    assert (
        main(
            [
                "run",
                "warmstart_segmenter",
                "-p",
                "steps",
                "2",
                "-p",
                "quality_scenes",
                "2",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert before == {p.name: p.read_bytes() for p in EMBEDDED_SEGMENTER.iterdir()}
    assert (
        load_segmenter(str(tmp_path / "run" / "segmenter"), device="cpu").predictor.model.image_size
        == Sam2Size().image_size
    )
    assert set(read_json(tmp_path / "run" / "results.json")) == {"objects", "iou", "worst", "table"}
