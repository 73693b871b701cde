"SAM 3, by the hub's own classes at a small size: as a segmenter, and as DR²Seg's reward."

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dr2seg_lib.cli import main
from dr2seg_lib.core.files import read_json, read_jsonl
from dr2seg_lib.core.masks import box_iou, decode_rle, iou, ratio
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.samples import Target
from dr2seg_lib.evaluation.config import EvaluateConfig
from dr2seg_lib.evaluation.evaluate import run_evaluation
from dr2seg_lib.methods.dpad import dpad
from dr2seg_lib.methods.dr2seg import (
    cached_segmenter,
    dr2seg,
    dr2seg_sam3,
    dr2seg_sam3_desc,
    mask_reward,
)
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.rollouts.parsing import (
    format_response,
    parse_response,
    recorded_parse,
    segmenter_phrase,
    segmenter_prompts,
)
from dr2seg_lib.rollouts.response import Group, Response
from dr2seg_lib.segmenters.loading import EMBEDDED_SEGMENTER, is_sam3, load_segmenter
from dr2seg_lib.segmenters.sam3 import Sam3Segmenter, Sam3Size
from dr2seg_lib.training.config import TrainConfig, check_training
from dr2seg_lib.training.trainer import build_training_state, train
from dr2seg_lib.viewing.photo import segment_photo


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "In the hub's layout. Its presence head says that all is there: every phrase has a mask."
    torch.manual_seed(0)
    sam3 = Sam3Size().build()
    sam3.model.detr_decoder.presence_head.layer3.bias.data.fill_(6.0)
    sam3.save(made := tmp_path_factory.mktemp("hub") / "sam3")
    return made


@pytest.fixture(scope="module")
def sam3(folder):
    return load_segmenter(str(folder), device="cpu")


@pytest.fixture(scope="module")
def image():
    return MiniReasonSeg("val")[0].image[:200]  # not a square


@pytest.fixture
def looks(sam3):
    "What the vision tower is given."
    seen = []
    hook = sam3.model.vision_encoder.register_forward_hook(
        lambda _, given, out: seen.append(given[0].shape[0])
    )
    yield seen
    hook.remove()


# The segmenter

PHRASES = [
    "red ball",
    "the large star",
    "",
    "red ball",
    "  ",
    "x" * 900,
    "größer ☺\n",
    *(f"thing {i}" for i in range(7)),
]


@pytest.fixture
def exact(sam3):
    "In float64: sums of a batch of eight round as those of one do, as far as a mask can show."
    sam3.model.double()
    yield sam3
    sam3.model.float()


def test_many_phrases_cost_one_look_and_draw_what_each_draws_alone(exact, image, looks):
    sam3 = exact
    masks = sam3.masks(image, PHRASES)
    assert looks == [1]
    assert all(m.shape == image.shape[:2] and m.dtype == bool for m in masks)
    assert len(masks) == len(PHRASES) > sam3.batch
    looks.clear()
    assert all(np.array_equal(m, sam3.masks(image, [p])[0]) for m, p in zip(masks, PHRASES))
    assert len(looks) == len(PHRASES) - 2
    assert np.array_equal(sam3.segment(image, PHRASES[:2]), masks[0] | masks[1])
    assert not np.array_equal(masks[0], masks[1])


def test_nothing_said_nothing_drawn(sam3, image, looks):
    assert sam3.masks(image, []) == []
    assert not np.any(sam3.masks(image, ["", " \n"]))
    assert not sam3.segment(image, []).any()
    assert looks == []


def test_nothing_found_nothing_drawn(sam3, image):
    assert (
        not Sam3Segmenter(sam3.model, sam3.processor, threshold=0.99)
        .segment(image, ["red ball"])
        .any()
    )


def test_a_phrase_is_cut_behind_its_thirtieth_token(sam3, image):
    "Every letter is a token here; start and end are the other two of 32."
    read, start, end = (
        [],
        *sam3.processor.tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"]),
    )
    hook = sam3.model.text_encoder.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"]), with_kwargs=True
    )
    a, b, c = sam3.masks(image, ["r" * 30, "r" * 30 + " and balls", "z" * 30])
    hook.remove()
    assert read[0].shape == (3, 32)
    assert read[0][0].equal(read[0][1])
    assert read[0][:, 0].eq(start).all()
    assert read[0][:, -1].eq(end).all()
    assert read[0][:, 1:-1].ne(end).all()
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_phrase_that_spells_the_end_is_read_on(sam3, image):
    read, (end,) = [], sam3.processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>"])
    hook = sam3.model.text_encoder.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"]), with_kwargs=True
    )
    sam3.masks(image, ["red<|endoftext|>", "red ball"])
    hook.remove()
    plain = sam3.processor.tokenizer(
        ["red ball"], padding="max_length", max_length=32, return_tensors="pt"
    )["input_ids"]
    assert read[0][0].eq(end).nonzero()[0] > 4, "the letters of the word, one by one"
    assert read[0][1:].equal(plain), "the ids of ordinary words are what they were"


def test_it_draws_what_the_processor_would(sam3, image):
    with torch.no_grad():
        out = sam3.model(
            **{
                k: v
                for k, v in sam3.processor(
                    images=image, text="red ball", return_tensors="pt"
                ).items()
                if k != "original_sizes"
            }
        )
    found = sam3.processor.post_process_instance_segmentation(out, target_sizes=[image.shape[:2]])[
        0
    ]
    assert len(found["masks"]) == 8
    assert np.array_equal(found["masks"].any(0).numpy(), sam3.masks(image, ["red ball"])[0])


def test_a_box_draws_one_of_the_instances(sam3, image, looks):
    boxes = [(30, 30, 90, 80), (0, 0, 223, 199), (100, 20, 190, 150)]
    masks = sam3.masks(
        image,
        [*(Target(b, (60, 60)) for b in boxes), Target((200, 10, -5, 1e99), (float("nan"), 5))],
    )
    assert looks == [1]
    assert len(masks) == 4
    assert any(m.any() for m in masks)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        with torch.no_grad():
            out = sam3.model(
                **{
                    k: v
                    for k, v in sam3.processor(
                        images=image, input_boxes=[[[x1, y1, x2 + 1, y2 + 1]]], return_tensors="pt"
                    ).items()
                    if k != "original_sizes"
                }
            )
        found = sam3.processor.post_process_instance_segmentation(
            out, target_sizes=[image.shape[:2]]
        )[0]
        best = box_iou(found["boxes"].numpy(), [(x1, y1, x2, y2)])[:, 0].argmax()
        assert np.array_equal(found["masks"][best].numpy() > 0, mask)


@pytest.mark.parametrize(
    "text, query, want",
    [
        (
            "<think>x</think><description> the red\nmug </description><answer>[OK]</answer>",
            "q",
            "the red\nmug",
        ),
        ("<answer>[OK]</answer><caption> a mug </caption>", "q", "a mug"),
        ("<description>d</description><answer>[OK]</answer><caption>c</caption>", "q", "d"),
        ("<think>x</think><answer>[OK]</answer>", " what holds tea? ", "what holds tea?"),
        ("<description></description><answer>[OK]</answer><caption> </caption>", "q", "q"),
        ("<description>none</description><answer>[]</answer>", "q", ""),
        ("<description>the mug</description><answer>[OK</answer>", "q", ""),
        ("the mug", "q", ""),
        ("", "", ""),
    ],
)
def test_what_of_an_answer_is_the_phrase(text, query, want):
    text = text.replace("OK", '{"bbox_2d": [1,2,3,4], "point_2d": [2,3]}')
    assert segmenter_phrase(parse_response(text), query) == want


def test_a_segmenter_is_prompted_with_what_it_takes(sam3):
    text = format_response("x", "the mug", [Target((10, 20, 30, 40), (20, 30))])
    parsed = parse_response(text)
    assert segmenter_prompts(sam3, parsed, "q", 112, (224, 56)) == ["the mug"]
    assert segmenter_prompts(sam3, parse_response(""), "q", 112, (9, 9)) == []
    (target,) = segmenter_prompts(load_segmenter("grabcut"), parsed, "q", 112, (224, 56))
    assert target.box == (20, 10, 60, 20)


# Loading


def test_names():
    assert all(map(is_sam3, ("facebook/sam3", "facebook/sam3.1", "somebody/my-SAM3-tuned")))
    assert not any(
        map(
            is_sam3,
            (
                "",
                "embedded",
                "grabcut",
                "sam3",
                "/data/sam3",
                "./sam3",
                "facebook/sam2.1-hiera-large",
                str(EMBEDDED_SEGMENTER),
                str(EMBEDDED_SEGMENTER.parent),
            ),
        )
    )


def test_the_layouts_of_the_hub(folder, sam3, image, tmp_path):
    "In shards; and as facebook/sam3 is, a video model with the detector in it."
    (
        sam3.model.save_pretrained(tmp_path / "shards", max_shard_size="300KB"),
        sam3.processor.save_pretrained(tmp_path / "shards"),
    )
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    shutil.copytree(folder, tmp_path / "video")
    weights, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    save_file(
        {f"detector_model.{k}": v for k, v in weights.items()}
        | {"tracker_model.mask": torch.zeros(2), "tracker_neck.conv": torch.zeros(2)},
        tmp_path / "video" / "model.safetensors",
    )
    (tmp_path / "video" / "config.json").write_text(
        json.dumps(dict(model_type="sam3_video", detector_config=config, tracker_config={}))
    )
    want = sam3.masks(image, PHRASES[:2])
    for name in "shards", "video":
        assert is_sam3(str(tmp_path / name))
        assert all(
            np.array_equal(a, b)
            for a, b in zip(
                load_segmenter(str(tmp_path / name), "cpu").masks(image, PHRASES[:2]), want
            )
        )
    next((tmp_path / "shards").glob("model-*.safetensors")).unlink()
    refused(tmp_path / "shards", "cannot be loaded", "model-0000")


def refused(name, *words):
    with pytest.raises(ValueError) as e:
        load_segmenter(str(name), device="cpu")
    said = str(e.value)
    assert said.startswith("segmenter: "), said
    assert "\n" not in said, said
    assert len(said) < 460, said
    assert all(w in said for w in (str(name), *words)), said


def change(path, **values):
    path.write_text(
        json.dumps(
            {k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}
        )
    )


def without(path, key):
    save_file({k: v for k, v in load_file(path).items() if k != key}, path)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: (f / "model.safetensors").unlink(), ["cannot be loaded", "model.safetensors"]),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:5000]
            ),
            ["cannot be loaded"],
        ),
        (
            lambda f: without(f / "model.safetensors", "text_projection.weight"),
            ["lacks 1 of SAM 3's weights, text_projection.weight"],
        ),
        (lambda f: (f / "processor_config.json").unlink(), ["cannot be loaded", "image processor"]),
        (lambda f: (f / "tokenizer.json").unlink(), ["has 2 tokens and its text encoder 514"]),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "sam3"'),
            ["config.json is no JSON object"],
        ),
        (
            lambda f: change(f / "config.json", model_type="clip"),
            ["describes clip", "one of SAM 3"],
        ),
        (lambda f: change(f / "config.json", model_type=None), ["describes no model"]),
        (
            lambda f: change(
                f / "config.json",
                text_config=dict(model_type="clip_text_model", hidden_size="much"),
            ),
            ["cannot be loaded"],
        ),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_a_folder_that_is_not_whole_is_one_sentence(folder, tmp_path, damage, words):
    shutil.copytree(folder, tmp_path / "sam3")
    damage(tmp_path / "sam3")
    refused(tmp_path / "sam3", *words)


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    "Nor does this machine hold the model."
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("facebook/sam3", "cannot be loaded", "whose terms your hub account must have accepted")


# The reward

OK = [Target((10, 10, 40, 40), (20, 20))]


def answered(description, targets=OK, tokens=20):
    text = format_response("so.", description, targets)
    return Response(text, parse_response(text), [text], [0.0], [1.0], tokens)


def test_drawn_reward_by_hand():
    earned = mask_reward([[0, 0.25], [0.5, 0.75]])
    assert earned["accuracy"].tolist() == [[0, 0.75], [1.5, 2.25]]
    assert earned["description"].tolist() == [[0, 0], [0, 1]]
    assert mask_reward(1)["accuracy"] == 3
    assert mask_reward([])["accuracy"].shape == (0,)


def test_terms_by_hand(folder, sam3, monkeypatch, looks):
    "The image is encoded once; no description earns nothing; Eq. 8 goes by the drawn accuracy."
    monkeypatch.setattr("dr2seg_lib.methods.dr2seg.cached_segmenter", dict(there=sam3).__getitem__)
    sample = MiniReasonSeg("val")[1]
    ball, star = sam3.masks(sample.image, ["the ball", "a star"])
    looks.clear()
    group = Group(
        replace(sample, targets=(Target.of(ball),)),
        [
            answered("the ball"),
            answered("a star", tokens=50),
            answered(None),
            answered("the ball", []),
        ],
        [answered(None, tokens=n) for n in (8, 8)] + [None, answered(None, tokens=30)],
    )
    terms, total = replace(dr2seg_sam3, segmenter="there").reward(group, 112)
    shared = ratio(*iou(ball, star))
    assert looks == [1]
    assert list(terms) == [
        "thinking_format",
        "answer_format",
        "non_repeat",
        "accuracy",
        "description",
        "length",
    ]
    assert terms["accuracy"].tolist() == pytest.approx([3, 3 * shared, 0, 0])
    assert terms["description"].tolist() == [1, shared > 0.5, 0, 0]
    assert terms["length"].tolist() == [1, 0.5, 0, 0]
    assert terms["thinking_format"].tolist() == [1, 1, 0, 1]
    assert total.tolist() == pytest.approx([8, (4 + 3 * shared + (shared > 0.5)) * 0.5, 0, 0])
    alone, total = replace(dr2seg_sam3_desc, segmenter="there").reward(
        replace(group, second=[None] * 4), 112
    )
    assert alone == {k: alone[k] for k in terms if k != "length"}
    assert alone["accuracy"].equal(terms["accuracy"])
    assert total.tolist() == pytest.approx([8, 4 + 3 * shared + (shared > 0.5), 3, 2])
    nothing = Group(replace(sample, targets=()), [answered(None), answered(None, [])], [None] * 2)
    assert replace(dr2seg_sam3, segmenter="there").reward(nothing, 112)[0]["accuracy"].tolist() == [
        0,
        0,
    ]


def test_other_recipes_ask_no_segmenter():
    asking = [r.name for r in METHODS.values() if r.segmenter]
    assert asking == ["dr2seg_sam3_desc", "dr2seg_sam3"]
    assert all(METHODS[n].described for n in asking)
    assert dr2seg.described
    assert not dpad.described


# With everything else

SMALL = dict(
    recipe="dr2seg_sam3",
    steps=1,
    prompts=2,
    samples=2,
    rank=4,
    alpha=4,
    eval_samples=2,
    max_new_tokens=96,
    kl=0,
)


def test_a_training_step(folder, tmp_path, monkeypatch):
    cached_segmenter.cache_clear()
    loaded = []
    monkeypatch.setattr(
        Sam3Segmenter,
        "__init__",
        lambda self, *args, made=Sam3Segmenter.__init__: (loaded.append(1), made(self, *args))[1],
    )
    run = train(TrainConfig(**SMALL, segmenter=str(folder)), tmp_path / "run")
    sam3, row, results = (
        cached_segmenter(str(folder)),
        run.metrics()[0],
        read_json(run.folder / "results.json"),
    )
    assert run.status == "done"
    assert loaded == [1]
    assert row["tokens_second"] is not None
    assert {"before", "after"} <= set(results)
    data, n = {s.id: s for s in (MiniReasonSeg("train")[i] for i in range(64))}, 0
    for r in run.rollouts():
        n += (said := segmenter_phrase(recorded_parse(r["first"]))) != ""
        if r["sample"] not in data:
            continue
        sample = data[r["sample"]]
        assert r["terms"]["accuracy"] == pytest.approx(
            3 * ratio(*iou(sam3.masks(sample.image, [said])[0], sample.mask))
        )
    assert n
    assert row["accuracy"] == pytest.approx(row["terms"]["accuracy"] / 3)


def test_what_is_missing_is_said_before_anything_starts(folder, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        ValueError,
        match="segmenter: dr2seg_sam3 rewards what SAM 3 draws from a description, "
        "and embedded is not SAM 3; use facebook/sam3 or a folder of it",
    ):
        check_training(TrainConfig(**SMALL))
    assert (
        main(
            [
                "run",
                "train",
                "-p",
                "recipe",
                "dr2seg_sam3_desc",
                "-p",
                "segmenter",
                "grabcut",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 2
    )
    assert "grabcut is not SAM 3" in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(MiniReasonSeg, "masked", False, raising=False)
    with pytest.raises(
        ValueError,
        match="data: mini has boxes and points without masks, and dr2seg_sam3 compares masks",
    ):
        check_training(TrainConfig(**SMALL, segmenter=str(folder)))
    shutil.copytree(folder, tmp_path / "sam3")
    (tmp_path / "sam3" / "model.safetensors").unlink()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="segmenter: '.*sam3' cannot be loaded"):
        build_training_state(TrainConfig(**SMALL, segmenter=str(tmp_path / "sam3")))


def test_an_evaluation_draws_the_description_or_the_question(folder, sam3, tmp_path):
    for recipe in "dr2seg", "visionreasoner":
        run = run_evaluation(
            EvaluateConfig(segmenter=str(folder), recipe=recipe, samples=2), tmp_path / recipe
        )
        rows, data = read_jsonl(run.folder / "predictions.jsonl"), MiniReasonSeg("val")
        for i, r in enumerate(rows):
            said = segmenter_phrase(recorded_parse(r), r["query"])
            assert np.array_equal(decode_rle(r["rle"]), sam3.segment(data[i].image, [said]))
            assert not said or (said == r["query"]) == (recipe == "visionreasoner")
        assert read_json(run.folder / "results.json")["n"] == 2
        assert any(segmenter_phrase(recorded_parse(r), r["query"]) for r in rows)


def test_a_photograph(folder, sam3):
    image = MiniReasonSeg("val")[0].image
    found = segment_photo(image, MiniReasonSeg("val")[0].query, segmenter=str(folder))
    said = segmenter_phrase(found.response.parsed)
    assert said
    assert len(found.targets) == 1
    assert np.array_equal(found.mask, sam3.segment(image, [said]))
    assert found.targets[0].mask[found.targets[0].point[::-1]]
    assert np.array_equal(
        segment_photo(image, box="0,0,223,199", segmenter=str(folder)).mask,
        sam3.segment(image, [Target((0, 0, 223, 199), (9, 9))]),
    )
