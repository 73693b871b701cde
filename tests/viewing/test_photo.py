"One photograph in, a picture and a record out."

import json
import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from dr2seg_lib.cli import main
from dr2seg_lib.core.masks import decode_rle
from dr2seg_lib.data.mini import MiniReasonSeg, draw_sample
from dr2seg_lib.data.samples import Target
from dr2seg_lib.models.loading import load_policy
from dr2seg_lib.segmenters.loading import load_segmenter
from dr2seg_lib.viewing.photo import check_photo_folder, segment_photo
from dr2seg_lib.viewing.photo_picture import draw_photo_caption, draw_segmented
from dr2seg_lib.viewing.photo_sheet import segment_questions

HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"  # 512 × 600
CAP = "150,18,384,152"


@pytest.fixture(autouse=True)
def no_policy(monkeypatch):
    "A box asks no policy; a question asks the embedded one."

    def load(*args, **kwargs):
        loaded.append(args)
        return real(*args, **kwargs)

    loaded, real = [], load_policy
    monkeypatch.setattr("dr2seg_lib.viewing.photo.load_policy", load)
    return loaded


def test_a_box_and_grabcut_need_no_weights(no_policy):
    found = segment_photo(HOPPER, box=CAP, point="265,130")
    assert not no_policy
    assert found.asked == dict(segmenter="grabcut")
    assert found.response is None
    ys, xs = np.nonzero(found.mask)
    assert xs.min() >= 150
    assert xs.max() <= 384
    assert ys.min() >= 18
    assert ys.max() <= 152
    assert 0.4 < found.mask[18:153, 150:385].mean() < 0.95, (
        "the cap, neither nothing nor the whole box"
    )
    assert found.mask[130, 265], "the cap, neither nothing nor the whole box"
    assert not found.mask[25, 160], "the flag and the wall beside it are not"
    assert not found.mask[25, 375], "the flag and the wall beside it are not"


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = Image.open(HOPPER)
    picture.save("cap.png")
    (tmp_path / "cap.json").write_text('{"mine": true}')  # as ReasonSeg has it beside a photo
    png, record = segment_photo("cap.png", "what is worn?", box=CAP).save()
    assert {p.name for p in tmp_path.iterdir()} == {
        "cap.png",
        "cap.json",
        "cap.segment.png",
        "cap.segment.json",
    }
    assert json.loads((tmp_path / "cap.json").read_text()) == {"mine": True}
    kept = json.loads(record.read_text())
    assert (kept["photo"], kept["size"], kept["query"], kept["segmenter"], kept["response"]) == (
        "cap",
        [512, 600],
        "what is worn?",
        "grabcut",
        None,
    )
    (one,) = kept["objects"]
    assert one["box"] == [150, 18, 384, 152]
    assert one["point"] == [267, 85]
    assert decode_rle(one["mask"]).sum() == one["area"] == decode_rle(kept["mask"]).sum()
    assert decode_rle(one["mask"]).shape == (600, 512)
    assert Image.open(png).size[0] == 546  # 600 high grows to 640, and a caption below


def test_an_earlier_result_stays(tmp_path):
    found = segment_photo(HOPPER, box=CAP)
    (tmp_path / "grace_hopper.segment.json").write_text("of another day")

    def names(**how):
        return [p.name for p in found.save(tmp_path, **how)]

    assert names() == ["grace_hopper.segment-2.png", "grace_hopper.segment-2.json"]
    assert names() == ["grace_hopper.segment-3.png", "grace_hopper.segment-3.json"]
    assert (tmp_path / "grace_hopper.segment.json").read_text() == "of another day"
    assert names(overwrite=True) == ["grace_hopper.segment.png", "grace_hopper.segment.json"]
    assert (
        json.loads((tmp_path / "grace_hopper.segment.json").read_text())["photo"] == "grace_hopper"
    )
    assert len(list(tmp_path.iterdir())) == 6


def test_a_long_name_and_one_that_is_no_text_are_saved(tmp_path):
    found = segment_photo(HOPPER, box=CAP)
    for name in "x" * 250, "ü" * 120, "a\udcff":
        png, record = replace(found, name=name).save(tmp_path)
        assert Image.open(png).size[0] == 546
        assert json.loads(record.read_text())["segmenter"] == "grabcut"


@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below"])
def test_a_file_where_a_folder_should_be_is_told_before_anything_is_loaded(
    tmp_path, monkeypatch, capsys, out
):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("dr2seg_lib.viewing.photo.segment_photo", None)  # would be too late
    assert main(["segment", str(HOPPER), "--box", CAP, "--out", str(tmp_path / out)]) == 2
    assert (
        capsys.readouterr().err
        == f"dr2seg: {tmp_path}/file is a file; name a folder for the results.\n"
    )
    with pytest.raises(ValueError, match="is a file"):
        check_photo_folder(tmp_path / out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_link_that_leads_nowhere_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match="link is a link that leads nowhere; name a folder"):
        check_photo_folder(tmp_path / "link" / "below")


def test_an_adapter_brings_what_it_was_trained_with(tmp_path, monkeypatch, no_policy):
    asked = dict(
        model="embedded",
        method="visionreasoner",
        segmenter="grabcut",
        dtype="float32",
        max_new_tokens=20,
    )
    monkeypatch.setattr(
        "dr2seg_lib.viewing.photo.inherit",
        lambda given: (asked | {k: v for k, v in given.items() if v}, "from runs/x"),
    )
    sample = MiniReasonSeg("val")[0]
    found = segment_photo(sample.image, sample.query)
    assert found.asked == dict(
        model="embedded", adapter="", method="visionreasoner", segmenter="grabcut"
    )
    assert found.response.cut
    assert len(found.response.tokens) == 20
    assert (
        segment_photo(sample.image, sample.query, max_new_tokens=3, method="dr2seg").asked["method"]
        == "dr2seg"
    )


def test_a_question_of_a_million_letters_has_a_caption_of_a_few_lines():
    assert draw_photo_caption(640, "x" * 10**6, "y" * 10**6).shape[0] < 200


def test_a_question_that_is_no_text_is_one_sentence(capsys):
    assert main(["segment", str(HOPPER), "what\udcff", "--box", CAP]) == 2
    assert "the question" in (said := capsys.readouterr().err)
    assert "is not UTF-8" in said


def test_a_question_is_answered_as_in_evaluation(no_policy):
    sample = next(s for s in MiniReasonSeg("val") if len(s.targets) == 2)
    found = segment_photo(sample.image, sample.query)
    assert len(no_policy) == 1
    assert found.asked == dict(model="embedded", adapter="", method="dr2seg", segmenter="embedded")
    assert found.response.parsed.description in " ".join(found.record()["response"]["text"].split())
    assert len(found.record()["objects"]) == len(found.targets)
    drawn = load_segmenter("embedded").segment(sample.image, found.targets)
    assert np.array_equal(drawn, found.mask)


def test_an_answer_without_an_object_is_nothing_found(monkeypatch):
    monkeypatch.setattr("dr2seg_lib.viewing.photo.segmenter_prompts", lambda *a: [])
    found = segment_photo(MiniReasonSeg("val")[0].image, "the elephant?")
    assert not found.targets
    assert not found.mask.any()
    assert "nothing found" in found.note
    assert found.record()["objects"] == []
    assert found.picture().shape[1] == 640


def test_the_picture_dims_what_was_not_asked_for():
    image = np.full((300, 400, 3), 200, np.uint8)
    mask = np.zeros((300, 400), bool)
    mask[100:200, 100:300] = True
    drawn = draw_segmented(
        image, [Target((100, 100, 299, 199), (150, 150), mask)], "a title", "a note"
    )
    assert drawn.shape[1] == 640
    assert drawn.shape[0] > 480
    assert (drawn[260, 400] == 200).all()
    assert (drawn[50, 50] < 140).all()
    assert (draw_segmented(image, [])[:480] == 200).all()
    assert draw_segmented(np.zeros((3000, 2000, 3), np.uint8), []).shape[1] == round(
        2000 * 1280 / 3000
    )
    assert draw_segmented(np.zeros((1, 2000, 3), np.uint8), []).shape[1] == 1280


@pytest.mark.parametrize(
    "args, says",
    [
        (["nothing.jpg", "what"], "nothing.jpg does not exist"),
        (["text.jpg", "what"], "text.jpg: the image cannot be decoded"),
        ([".", "what"], "the image . is no file; put the file there"),
        ([str(HOPPER)], "nothing is asked; give a question, or a box as x1,y1,x2,y2."),
        ([str(HOPPER), "what", "--point", "3,3"], "a point needs its box; give it as x1,y1,x2,y2."),
        (
            [str(HOPPER), "--box", "1,2,3"],
            'box "1,2,3" is not x1,y1,x2,y2; give 4 numbers, in pixels of the image.',
        ),
        (
            [str(HOPPER), "--box", "1,2,3,many"],
            'box "1,2,3,many" is not x1,y1,x2,y2; give 4 numbers, in pixels of the image.',
        ),
        (
            [str(HOPPER), "--box", "1,2,inf,4"],
            'box "1,2,inf,4" is not x1,y1,x2,y2; give 4 numbers, in pixels of the image.',
        ),
        (
            [str(HOPPER), "--box", "50,20,10,60"],
            "box 50,20,10,60 has no area; give its left, top, right and bottom edge.",
        ),
        (
            [str(HOPPER), "--box", "50,20,512,60"],
            "box 50,20,512,60 leaves the image of 512×600 pixels; "
            "keep x within 0 to 511 and y within 0 to 599.",
        ),
        (
            [str(HOPPER), "--box=-1,20,51,60"],
            "box -1,20,51,60 leaves the image of 512×600 pixels; "
            "keep x within 0 to 511 and y within 0 to 599.",
        ),
        (
            [str(HOPPER), "--box", CAP, "--point", "3,3"],
            "point 3,3 is not in the box 150,18,384,152; put it on the object.",
        ),
        (
            [str(HOPPER), "--box", CAP, "--point", "3"],
            'point "3" is not x,y; give 2 numbers, in pixels of the image.',
        ),
        ([str(HOPPER), "--box", CAP, "--segmenter", "sam9"], "segmenter: 'sam9' is not known"),
        (
            [str(HOPPER), "--box", CAP, "--out", "text.jpg"],
            "text.jpg is a file; name a folder for the results.",
        ),
        ([str(HOPPER), "what", "--model", "embeded"], "model 'embeded' is unknown; use embedded"),
        (
            [str(HOPPER), "what", "--attention", "flash", "--dtype", "bfloat16"],
            "attention flash needs a GPU and the package flash_attn; "
            "install it with pip install flash-attn, or use sdpa",
        ),
        (
            [str(HOPPER), "what", "--attention", "fast"],
            "attention 'fast' is unknown; use one of sdpa, eager, flash",
        ),
        ([str(HOPPER), "what", "--method", "dr3seg"], "method 'dr3seg' is unknown; use one of"),
        ([str(HOPPER), "what", "--recipe", "dr3seg"], "method 'dr3seg' is unknown; use one of"),
        (
            [str(HOPPER), "what", "--adapter", "nowhere"],
            "adapter nowhere does not exist; name a checkpoint such as",
        ),
        (
            [str(HOPPER), "what", "--model", "nobody/nothing"],
            "model nobody/nothing cannot be loaded",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, args, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jpg").write_text("no picture")
    assert main(["segment", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dr2seg: ")
    assert err.count("\n") == 1
    assert says in err
    assert [p.name for p in tmp_path.iterdir()] == ["text.jpg"]


def test_the_command(tmp_path, capsys):
    assert (
        main(["segment", str(HOPPER), "--box", CAP, "--out", str(tmp_path / "new" / "folder")]) == 0
    )
    out, err = capsys.readouterr()
    note, *paths = out.splitlines()
    assert err == ""
    assert re.fullmatch(r"1 object · [56]\.\d% of the image · segmenter grabcut", note)
    assert paths == [
        f"{tmp_path}/new/folder/grace_hopper.segment.{kind}" for kind in ("png", "json")
    ]
    assert main(["segment", str(HOPPER), "what is worn on the head?", "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "tokens of reasoning" in out
    assert "knows only the drawn world" in err


def test_several_questions_are_answered_on_one_page(tmp_path, capsys):
    sample = draw_sample(2_000_049)
    photo, questions = tmp_path / "scene.png", [sample.query, "what here is round?", "what is red?"]
    Image.fromarray(sample.image).save(photo)
    assert main(["segment", str(photo), *questions, "--out", str(tmp_path / "out")]) == 0
    out, _ = capsys.readouterr()
    assert [line.partition(": ")[0] for line in out.splitlines()[:3]] == questions
    record = json.loads((tmp_path / "out" / "scene.segment.json").read_text())
    assert [answer["query"] for answer in record["answers"]] == questions
    for answer in record["answers"]:
        alone = segment_photo(sample.image, answer["query"])
        assert answer["response"]["text"] == alone.response.text
        assert np.array_equal(decode_rle(answer["mask"]), alone.mask)
    assert Image.open(tmp_path / "out" / "scene.segment.png").width == 2 * (360 + 12)


def test_the_picture_is_encoded_once(monkeypatch):
    from dr2seg_lib.models.policy import Policy

    encode, seen = Policy.encode, []

    def counted(self, images):
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(Policy, "encode", counted)
    image = draw_sample(2_000_049).image
    sheet = segment_questions(image, ["what is red?", "what here is round?"])
    assert seen == [1] and len(sheet.answers) == 2


def test_two_adapters_are_compared_side_by_side(tmp_path, capsys):
    sample = draw_sample(2_000_049)
    photo = tmp_path / "scene.png"
    Image.fromarray(sample.image).save(photo)
    load_policy("embedded", device="cpu").add_lora(4, 4).adapter.save_pretrained(tmp_path / "mine")
    words = ["--compare", "visionreasoner", "--compare", str(tmp_path / "mine")]
    assert main(["segment", str(photo), sample.query, *words, "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "scene.segment.json").read_text())
    asked = [(a["method"], Path(a["adapter"]).name) for a in record["answers"]]
    assert asked == [("dr2seg", ""), ("visionreasoner", ""), ("dr2seg", "mine")]
    first, _, last = (a["response"]["text"] for a in record["answers"])
    assert first == last  # a fresh adapter changes nothing
    assert Image.open(tmp_path / "scene.segment.png").width == 3 * (360 + 12)


@pytest.mark.parametrize(
    "words, says",
    [
        (["what", "is", "red"], 'a question of several words needs quotes: "what is red"'),
        (["what is it?", "and that?", "--box", CAP], "with --box nobody is asked"),
        (["what is it?", "--compare", "nope"], "adapter nope does not exist"),
        (["what is it?", " "], "a question is empty"),
    ],
)
def test_questions_that_cannot_be_meant_are_a_sentence(tmp_path, capsys, words, says):
    assert main(["segment", str(HOPPER), *words, "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())
