"Texts and pictures to cosines: the embedded CLIP, open_clip's ways of loading, DPAD's metrics."

import json
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dr2seg_lib.cli import main
from dr2seg_lib.core.files import read_json
from dr2seg_lib.data.mini import SPLIT_SEEDS, WARM_START, MiniReasonSeg, draw_problem
from dr2seg_lib.data.samples import Target
from dr2seg_lib.data.scenes import SceneObject, describe_objects
from dr2seg_lib.evaluation.discrimination import (
    discrimination_rows,
    response_caption,
    similarity_ratio,
)
from dr2seg_lib.methods.dpad import discriminative
from dr2seg_lib.models.requirements import EMBEDDED as POLICY
from dr2seg_lib.pretraining.scorer import draw_scorer_batch, train_clip
from dr2seg_lib.pretraining.scorer_loss import caption_fit, contrastive_loss
from dr2seg_lib.pretraining.scorer_pages import (
    SCORER_SIZE,
    ScorerCaption,
    ScorerPicture,
    caption_picture,
    draw_scorer_page,
    preprocess_picture,
)
from dr2seg_lib.pretraining.scorer_quality import preferences
from dr2seg_lib.pretraining.scorer_tokenizer import make_merges, write_merges
from dr2seg_lib.rollouts.parsing import parse_response
from dr2seg_lib.scorers.clip import (
    EMBEDDED_CLIP,
    MERGES,
    SCORER_FILES,
    Scorer,
    load_scorer,
    similarities,
    target_crop,
    text_tokens,
)
from dr2seg_lib.viewing.discrimination import (
    DISCRIMINATION,
    discrimination_table,
    similarity_scatter,
    split_strata,
    stratified_table,
    token_strata_plot,
)
from dr2seg_lib.viewing.style import METHOD_COLOURS

VAL = SPLIT_SEEDS["val"][0]
TINY = dict(
    embed_dim=16,
    vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8),
    text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1),
)


def box(*b):
    return Target(b, (0, 0))


@pytest.fixture(scope="module")
def clip():
    return load_scorer("embedded", device="cpu")


@pytest.fixture(scope="module")
def samples():
    return list(MiniReasonSeg("val", 4))


# The embedded scorer


def test_embedded_on_held_out_scenes(clip):
    found = preferences(clip, range(VAL + 300, VAL + 360))
    assert found["targets"]["n"] == 60
    assert found["things"]["n"] > 200
    for kind, q in found.items():
        assert q["whole"] >= 0.9, (kind, q)
        assert q["other"] >= 0.9, (kind, q)
        assert q["refused"] >= 0.8, (kind, q)


def test_weights_are_small_and_half_precision():
    from safetensors.torch import load_file

    assert sum(p.stat().st_size for p in EMBEDDED_CLIP.iterdir()) <= 10e6
    assert {t.dtype for t in load_file(EMBEDDED_CLIP / SCORER_FILES[1]).values()} <= {
        torch.float16,
        torch.int64,
    }


def test_it_is_open_clips_own_class_in_float32(clip):
    assert type(clip.model) is open_clip.CLIP
    assert not clip.model.training
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}


def test_what_a_policy_says_of_a_target(clip, samples):
    "Size, colour and shape with an article, and two targets joined: words of captions."
    won = []
    for i in range(40):
        p = draw_problem(VAL + 100 + i)

        def size(t):
            return f"a {t.size} {t.colour} {t.shape}"

        s = similarities(
            clip,
            [p.sample("x")],
            [
                [
                    " and ".join(map(size, p.question.targets)),
                    describe_objects(p.question.targets, p.scene),
                ]
            ],
        )
        won.append((s.s1 > s.s2)[0].float())
    assert torch.stack(won).mean(0).min() >= 0.9


def test_cosines_are_positive(clip, samples):
    s = similarities(
        clip,
        samples,
        [
            [describe_objects(t.question.targets, t.scene), t.question.text]
            for t in map(draw_problem, range(VAL, VAL + 4))
        ],
    )
    assert min(s.s1.min(), s.s2.min()) > 0
    assert max(s.s1.max(), s.s2.max()) < 1


# Vectors


def test_vectors_are_unit_and_need_no_gradient(clip, samples):
    for v in clip.images([s.image for s in samples]), clip.texts(["a red ball", "the blue star"]):
        assert v.dtype == torch.float32
        assert v.shape[1] == 128
        assert not v.requires_grad
        assert torch.allclose(v.norm(dim=1), torch.ones(len(v)), atol=1e-5)


def test_vectors_are_open_clips(clip, samples):
    "No more than encode_image and encode_text of what open_clip's own preprocessing makes."
    with torch.no_grad():
        image = clip.model.encode_image(
            clip.preprocess(Image.fromarray(samples[0].image))[None], normalize=True
        )
        text = clip.model.encode_text(clip.tokenizer(["the red ball"]), normalize=True)
    assert torch.allclose(image, clip.images([samples[0].image]), atol=1e-5)
    assert torch.allclose(text, clip.texts(["the red ball"]), atol=1e-5)


def test_company_does_not_matter(clip, samples):
    "Batches of any size, in any order, with doubles."
    alone = Scorer(clip.model, clip.preprocess, clip.tokenizer, batch=1)
    pictures = [s.image for s in samples] * 2
    assert torch.allclose(clip.images(pictures[::-1]), alone.images(pictures).flip(0), atol=1e-5)
    words = [f"the {c} ball" for c in ("red", "blue", "green")] * 30
    assert torch.allclose(clip.texts(words), alone.texts(words), atol=1e-5)
    assert clip.texts(words).shape == (90, 128)


def test_nothing_in_nothing_out(clip):
    assert len(clip.images([])) == len(clip.texts([])) == 0


# The cache


class Counted(torch.nn.Module):
    "A model that counts what it is asked to encode; vectors tell contents apart."

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.ones(1)), []

    def encode_image(self, x, normalize):
        self.seen.append(len(x))
        return torch.nn.functional.normalize(x.flatten(1)[:, :4] + 0.1, dim=1)

    encode_text = encode_image


def counted(**options):
    tokenizer = open_clip.SimpleTokenizer()
    return Scorer(
        Counted(), lambda image: torch.from_numpy(np.array(image)).float(), tokenizer, **options
    )


def test_each_content_is_encoded_once():
    scorer, rng = counted(), np.random.default_rng(0)
    a, b = rng.integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    first = scorer.images([a, b, a.copy()])
    assert scorer.model.seen == [2]
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert torch.equal(scorer.images([b, a]), first[[1, 0]])
    assert scorer.model.seen == [2]


def test_same_bytes_in_another_shape_are_another_picture():
    scorer = counted()
    scorer.preprocess = lambda image: torch.full((2, 2), float(image.size[0]))
    flat, tall = np.zeros((2, 8, 3), np.uint8), np.zeros((8, 2, 3), np.uint8)
    scorer.images([flat])
    scorer.images([tall])
    assert scorer.model.seen == [1, 1]


def test_a_picture_changed_in_place_is_seen_anew():
    scorer, a = counted(), np.zeros((4, 4, 3), np.uint8)
    before = scorer.images([a])
    a[:] = np.arange(48).reshape(4, 4, 3)
    assert not torch.equal(before, scorer.images([a]))


def test_the_cache_is_bounded_and_never_wrong():
    scorer = counted(keep=3, batch=2)
    pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(8)]
    pictures = [
        p + np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * i for i, p in enumerate(pictures)
    ]
    once = scorer.images(pictures)
    assert len(scorer.cache) == 3
    assert scorer.model.seen == [2] * 4
    assert torch.equal(scorer.images(pictures[::-1]), once.flip(0))
    assert sum(scorer.model.seen) == 8 + 5


def test_what_is_asked_again_is_kept_the_longest():
    "The pictures of many runs are the same, their texts are not."
    scorer = counted(keep=4, batch=2)
    pictures = [np.full((2, 2, 3), i, np.uint8) for i in range(2)]
    for run in range(5):
        scorer.images(pictures)
        scorer.texts([f"one text of run {run}", f"another of run {run}"])
    assert scorer.model.seen[0] == 2
    assert len(scorer.model.seen) == 1 + 5, "the pictures once, the texts of five runs"


def test_pictures_of_a_step_are_encoded_once(clip, samples):
    "Eight captions a sample: two pictures a sample, each text once."
    scorer = Scorer(clip.model, clip.preprocess, clip.tokenizer)
    asked = []
    encode = scorer.encode_once
    scorer.encode_once = lambda items, key, f: (asked.append(len(items)), encode(items, key, f))[1]
    similarities(scorer, samples, [["the red ball"] * 8] * 4)
    assert asked == [8, 1]


# Tokens


def test_tokens_are_counted_as_clip_counts():
    scorer = counted()
    assert [
        scorer.tokens(t) for t in ("", "a photo of a cat", "!", "hello " * 75, "hello " * 76)
    ] == [2, 7, 3, 77, 78]


def test_a_text_of_77_tokens_is_whole_and_one_of_78_is_two(clip):
    assert [len(clip.windows("ball " * n)) for n in (1, 75, 76, 150, 151)] == [1, 1, 2, 2, 3]
    assert clip.windows("ball " * 76)[1].split() == ["ball"]


def test_long_text_is_the_mean_of_its_windows(clip, samples):
    long = "the red ball " * 30 + "a small blue star " * 30
    whole = similarities(clip, samples[:1], [[long]])
    parts = similarities(clip, samples[:1], [clip.windows(long)])
    assert len(clip.windows(long)) == 3
    assert torch.allclose(whole.s1, parts.s1.mean(1, keepdim=True), atol=1e-5)
    assert whole.tokens.item() == 212


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\t",
        "\x00\x01",
        "\ud800",
        "ein grüner Ball ☺",
        "🟥" * 200,
        "ﬃ" * 90,
        "İ" * 60,
        "<end_of_text> a red ball <start_of_text>",
        "&#0;&lt;&amp;lt;",
        "a" * 3000,
        "ta" * 2000,
        "{}%s\\",
        "</w>",
        "1234567890" * 9,
        "\u202e\u200b",
    ],
)
def test_any_text_has_a_score(clip, samples, text):
    s = similarities(clip, samples[:1], [[text]])
    assert torch.isfinite(s.s1).all()
    assert torch.isfinite(s.s2).all()
    assert s.tokens.item() == (clip.tokens(text) if text else 0)
    assert torch.isfinite(discriminative(s.s1, s.s2, "binary", s.tokens)).all()


@settings(max_examples=60)
@given(text=st.text(max_size=200))
def test_no_text_raises(clip, text):
    assert clip.tokens(text) >= 2
    assert torch.isfinite(clip.texts(clip.windows(text))).all()


def test_tokenizer_knows_the_words_and_the_bytes(clip):
    for i in range(40):
        for word in draw_problem(VAL + i).question.text.replace(",", "").split():
            assert clip.tokens(word) == 3, word
    tokens = text_tokens(clip.tokenizer, "grün ☺ xyz")
    assert clip.tokenizer.decode(tokens).split() == ["grün", "☺", "xyz"]
    assert clip.tokenizer(["x"]).shape == (1, 77)
    assert clip.tokenizer.vocab_size == clip.model.vocab_size


def test_merges_are_repeatable(tmp_path):
    texts = [draw_problem(i).question.text for i in range(50)]
    assert make_merges(texts) == make_merges(texts)
    a, b = (write_merges(tmp_path / name, make_merges(texts)) for name in "ab")
    assert (tmp_path / "a" / MERGES).read_bytes() == (tmp_path / "b" / MERGES).read_bytes()
    assert a.encoder == b.encoder
    assert all(len(a.encode(w)) == 1 for t in texts for w in t.replace(",", "").split())


# The region


def test_region_by_hand():
    image = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(5, 6, 3)
    assert np.array_equal(target_crop(image, [box(1, 2, 3, 4)]), image[2:5, 1:4])
    assert np.array_equal(target_crop(image, [box(0, 0, 5, 4)]), image)
    assert np.array_equal(target_crop(image, [box(0, 0, 1, 1), box(4, 3, 4, 3)]), image[0:4, 0:5])
    assert target_crop(image, []) is image


wild = st.one_of(st.integers(-(10**6), 10**6), st.floats(), st.just(10**400))


@given(boxes=st.lists(st.tuples(wild, wild, wild, wild), min_size=1, max_size=3))
def test_any_box_gives_a_crop(boxes):
    image = np.zeros((7, 9, 3), np.uint8)
    h, w, _ = target_crop(image, [Target(b, (0, 0)) for b in boxes]).shape
    assert 1 <= h <= 7
    assert 1 <= w <= 9


@pytest.mark.parametrize(
    "b", [(5, 5, 5, 5), (900, 900, 999, 999), (-9, -9, -5, -5), (0, 3, 223, 3), (float("nan"),) * 4]
)
def test_degenerate_boxes_score(clip, samples, b):
    s = similarities(clip, [replace(samples[0], targets=(box(*b),))], [["a red ball"]])
    assert torch.isfinite(s.s1).all()


def test_without_targets_no_caption_wins(clip, samples):
    s = similarities(clip, [replace(samples[0], targets=())], [["a red ball", "the blue star"]])
    assert torch.equal(s.s1, s.s2)
    assert discriminative(s.s1, s.s2).sum() == 0


# s1 and s2


def test_similarities_by_hand(clip, samples):
    texts = [["the red ball", None, ""], ["a small blue star", "the red ball", "x"]]
    s = similarities(clip, samples[:2], texts)
    assert s.s1.shape == s.s2.shape == s.tokens.shape == (2, 3)
    for i, row in enumerate(texts):
        for j, text in enumerate(row):
            if not text:
                assert s.s1[i, j] == s.s2[i, j] == s.tokens[i, j] == 0
                continue
            t, (roi, whole) = (
                clip.texts([text])[0],
                clip.images([target_crop(samples[i].image, samples[i].targets), samples[i].image]),
            )
            assert s.s1[i, j].item() == pytest.approx(float(t @ roi), abs=1e-5)
            assert s.s2[i, j].item() == pytest.approx(float(t @ whole), abs=1e-5)
    assert s.tokens.tolist() == [[5, 0, 0], [6, 5, 3]]


def test_a_missing_or_endless_caption_earns_nothing(clip, samples):
    s = similarities(clip, samples[:1], [[None, "", "red ball " * 60]])
    for form in "binary", "difference", "scaled":
        assert discriminative(s.s1, s.s2, form, s.tokens).eq(0).all()


def test_all_captions_missing(clip, samples):
    s = similarities(clip, samples[:2], [[None], [""]])
    assert s.s1.eq(0).all()
    assert s.tokens.eq(0).all()
    assert s.s1.shape == (2, 1)


# Loading


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "open_clip's real classes, a small configuration under a name of its own, random weights."
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny-clip.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY)
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder, model.eval()


def test_a_checkpoint_under_its_models_name(tiny, samples):
    folder, model = tiny
    scorer = load_scorer(f"tiny-clip:{folder / 'tiny.pt'}", device="cpu")
    with torch.no_grad():
        want = model.encode_text(
            open_clip.get_tokenizer("ViT-B-32")(["a photo of a cat"]), normalize=True
        )
    assert torch.allclose(scorer.texts(["a photo of a cat"]), want, atol=1e-5)
    s = similarities(scorer, samples[:2], [["a cat"], ["a dog " * 90]])
    assert torch.isfinite(s.s1).all()
    assert s.tokens.tolist() == [[4], [182]]
    assert len(scorer.images([np.zeros((1, 90, 3), np.uint8)])) == 1


def test_a_folder_in_open_clips_form(tiny, tmp_path):
    from safetensors.torch import save_file

    folder, model = tiny
    (tmp_path / SCORER_FILES[0]).write_text(json.dumps(dict(model_cfg=TINY)))
    save_file(
        {k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / SCORER_FILES[1]
    )
    scorer = load_scorer(str(tmp_path), device="cpu")
    assert torch.allclose(
        scorer.texts(["a cat"]),
        load_scorer(f"tiny-clip:{folder / 'tiny.pt'}", device="cpu").texts(["a cat"]),
        atol=1e-5,
    )


def test_a_folder_with_a_tokenizer_of_the_hub(tmp_path, samples):
    "The other kind of tokenizer open_clip has; the policy's own stands in for one."
    from safetensors.torch import save_file

    for file in "tokenizer.json", "tokenizer_config.json":
        shutil.copy(POLICY / file, tmp_path)
    config = TINY | dict(
        text_cfg=TINY["text_cfg"] | dict(hf_tokenizer_name="here", vocab_size=1024)
    )
    (tmp_path / SCORER_FILES[0]).write_text(json.dumps(dict(model_cfg=config)))
    save_file(
        {k: v.contiguous() for k, v in open_clip.CLIP(**config).state_dict().items()},
        tmp_path / SCORER_FILES[1],
    )
    scorer, long = load_scorer(str(tmp_path), device="cpu"), "the red ball " * 40
    assert scorer.tokens("the red ball") == 5
    assert scorer.tokens(long) == 122
    assert " ".join(w.strip() for w in scorer.windows(long)) == long.strip()
    assert torch.isfinite(similarities(scorer, samples[:1], [["the red ball", long]]).s1).all()


def test_openais_tag_asks_for_quickgelu(monkeypatch):
    "The one thing about the published weights that their model's name does not say."
    asked = {}

    def create(model, **options):
        asked.update(options, model=model)
        raise RuntimeError("no network")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for tag, quick in (("openai", True), ("laion2b_s34b_b79k", None)):
        asked.clear()
        with pytest.raises(ValueError, match="no network"):
            load_scorer(f"ViT-B-32:{tag}")
        assert asked["pretrained"] == tag
        assert asked["model"] == "ViT-B-32"
        assert asked.get("force_quick_gelu") is quick


def one_sentence(name, error, *words):
    with pytest.raises(error) as e:
        load_scorer(name, device="cpu")
    said = str(e.value)
    assert "\n" not in said, said
    assert len(said) < 420, said
    assert all(w in said for w in words), said


@pytest.mark.parametrize(
    "name", ["clip9", "", ":", "ViT-B-32", "clip9:openai", "hf-hub:", "facebook/sam3"]
)
def test_unknown_name(name):
    one_sentence(name, ValueError, f"'{name}' is not known; use embedded")


def test_unknown_weights_and_missing_files(tmp_path):
    one_sentence(
        "ViT-B-32:nothing", FileNotFoundError, "'ViT-B-32:nothing' names neither", "openai"
    )
    one_sentence(f"ViT-B-32:{tmp_path}/x.pt", FileNotFoundError, f"{tmp_path}/x.pt")
    for name in SCORER_FILES:
        folder = tmp_path / name
        shutil.copytree(EMBEDDED_CLIP, folder)
        (folder / name).unlink()
        one_sentence(
            str(folder), FileNotFoundError, f"{folder / name} is missing", "warmstart_scorer.ipynb"
        )


def test_weights_that_cannot_be_downloaded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    one_sentence(
        "hf-hub:nobody/nothing-at-all",
        ValueError,
        "'hf-hub:nobody/nothing-at-all' cannot be loaded",
    )


@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint", b"PK\x03\x04broken", b"\x80\x02}q\x00.", None]
)
def test_corrupt_checkpoint(tiny, tmp_path, content):
    path = tmp_path / "broken.pt"
    path.write_bytes((tiny[0] / "tiny.pt").read_bytes()[:5000] if content is None else content)
    one_sentence(f"tiny-clip:{path}", ValueError, str(path), "cannot be loaded")


def test_checkpoint_of_another_model(tiny, tmp_path):
    torch.save(open_clip.CLIP(**TINY | dict(embed_dim=8)).state_dict(), tmp_path / "other.pt")
    one_sentence(
        f"tiny-clip:{tmp_path / 'other.pt'}", ValueError, "cannot be loaded", "that very model"
    )


@pytest.mark.parametrize("name", [*SCORER_FILES, MERGES])
def test_corrupt_folder(tmp_path, name):
    shutil.copytree(EMBEDDED_CLIP, tmp_path / "broken")
    path = tmp_path / "broken" / name
    path.write_bytes(path.read_bytes()[:100])
    one_sentence(str(tmp_path / "broken"), ValueError, f"'{tmp_path / 'broken'}' cannot be loaded")


# Training

red, blue = SceneObject("ball", "red", 50, 50, 25), SceneObject("star", "blue", 150, 150, 14)
small = replace(red, r=14.0, x=90)


def shows(*things):
    return ScorerPicture(np.zeros((SCORER_SIZE, SCORER_SIZE, 3), np.uint8), things, things)


def test_what_is_true_of_which_picture():
    captions = [
        ScorerCaption("the red ball", (red,), False),
        ScorerCaption("a small blue star", (blue,), True),
        ScorerCaption("a large red ball", (red,), True),
        ScorerCaption("both", (red, blue), False),
    ]
    pictures = [shows(red), shows(blue), shows(small), shows(red, blue)]
    assert torch.allclose(
        caption_fit(captions, pictures),
        torch.tensor([[1, 0, 1, 0.05], [0, 1, 0, 0.05], [1, 0, 1, 0.05], [0, 0, 0, 1]]),
    ), "its own picture always counts"
    assert caption_fit(captions[2:3], [shows(red)]).item() == 1
    assert caption_fit([captions[2], captions[1]], [shows(red), shows(small)])[0].tolist() == [1, 0]


def test_captions_are_true():
    rng = np.random.default_rng(0)
    for seed in range(WARM_START + 50, WARM_START + 70):
        page = draw_scorer_page(seed)
        for picture in (page.whole, *page.each, page.two):
            c = caption_picture(rng, page, picture)
            assert set(c.named) == set(picture.named) <= set(picture.inside)
            assert "a orange" not in c.text
            for t in c.named:
                assert t.colour in c.text
                assert t.shape in c.text
            if c.sized:
                assert all(t.size in c.text for t in c.named)


def test_a_page_is_what_the_scorer_will_see(clip):
    page = draw_scorer_page(WARM_START)
    p = page.problem
    assert np.array_equal(page.whole.pixels, preprocess_picture(p.scene.picture()))
    assert page.whole.pixels.shape == (SCORER_SIZE, SCORER_SIZE, 3)
    target = Target.of(p.scene.masks()[0])
    assert np.array_equal(
        page.each[0].pixels, preprocess_picture(target_crop(p.scene.picture(), [target]))
    )
    assert torch.allclose(
        clip.preprocess(Image.fromarray(p.scene.picture())),
        clip.preprocess(Image.fromarray(page.whole.pixels)),
    )


def test_loss_prefers_the_truth():
    v = torch.nn.functional.normalize(torch.eye(4) + 0.3, dim=1)
    right, wrong = (
        contrastive_loss(v, v.roll(k, 0), torch.eye(4), torch.tensor(20.0)).item() for k in (0, 1)
    )
    assert right < wrong
    flat = contrastive_loss(v, -v, torch.eye(4), torch.tensor(0.0)).item()
    cosine = v @ -v.T
    assert flat == pytest.approx(
        float(np.log(4) + 20 * (0.1 - cosine).clamp(min=0).square().mean()), abs=1e-5
    )


def test_lessons_are_pairs():
    rng, pages = np.random.default_rng(0), [draw_scorer_page(WARM_START + i) for i in range(3)]
    captions, pictures = draw_scorer_batch(rng, pages, 2, 2)
    assert len(captions) == len(pictures)
    assert 6 <= len(captions) <= 8
    assert all(set(c.named) == set(p.named) for c, p in zip(captions, pictures))


def test_training_is_repeatable_and_learns(tmp_path):
    def figures(name, seed):
        rows = []
        train_clip(
            tmp_path / name,
            steps=4,
            scenes=6,
            pages=3,
            crops=2,
            seed=seed,
            log=lambda step, row: rows.append(row),
        )
        return rows, (tmp_path / name / SCORER_FILES[1]).read_bytes()

    (a, wa), (b, wb), (c, _) = figures("a", 0), figures("b", 0), figures("c", 1)
    assert a == b
    assert wa == wb
    assert a != c
    assert a[-1]["loss"] < a[0]["loss"]


def test_experiment_makes_a_scorer(tmp_path):
    "The notebook that made the weights, two steps of it; the package's own weights are left alone."
    before = {p.name: p.read_bytes() for p in EMBEDDED_CLIP.iterdir()}
    assert (
        main(
            [
                "run",
                "warmstart_scorer",
                "-p",
                "steps",
                "2",
                "-p",
                "scenes",
                "4",
                "-p",
                "pages",
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
    assert before == {p.name: p.read_bytes() for p in EMBEDDED_CLIP.iterdir()}
    assert load_scorer(str(tmp_path / "run" / "scorer"), device="cpu").texts(
        ["the red ball"]
    ).shape == (1, 128)
    assert set(read_json(tmp_path / "run" / "results.json")) == {"quality", "cpu_minutes", "table"}


# DPAD's metrics


@pytest.mark.parametrize(
    "text, said",
    [
        ("<caption> a red ball </caption>", "a red ball"),
        ("<description>the star</description>", "the star"),
        ("", None),
        ("<caption></caption><description>x</description>", "x"),
        ("<description>d</description><caption>c</caption>", "c"),
        ("<caption>open", None),
        ("<caption> \n</caption>", None),
    ],
)
def test_caption_of(text, said):
    assert response_caption(parse_response(text)) == said


def test_ratio_by_hand():
    assert similarity_ratio([0.3, 0.2], [0.2, 0.4]).tolist() == pytest.approx([1.5, 0.5])
    assert similarity_ratio([0.3, 0, 0.2], [0, 0, -0.5]).tolist() == pytest.approx([30, 0, 20])


def answered(i, text, tokens=5, **tags):
    return dict(
        sample=f"mini-{VAL + i}",
        text=text,
        tokens=tokens,
        iou=0.5,
        i=1,
        u=2,
        tags=dict(query_type="logic", difficulty="easy") | tags,
    )


def test_rows_by_hand(clip, samples):
    rows = [
        answered(0, "<think>it is red</think><caption>the red ball</caption>"),
        answered(
            1,
            "<think>" + "so it is blue " * 40 + "</think><description>the blue star</description>",
        ),
        answered(2, "nothing to see"),
        answered(3, "<caption>" + "ball " * 90 + "</caption>"),
    ]
    kept = json.dumps(rows)
    found = discrimination_rows(clip, rows, samples, batch=3)
    assert json.dumps(rows) == kept
    assert [r["sample"] for r in found] == [r["sample"] for r in rows]
    s = similarities(
        clip,
        samples,
        [
            ["the red ball", "it is red"],
            ["the blue star", "so it is blue " * 40],
            [None, "nothing to see"],
            [None, rows[3]["text"]],
        ],
    )
    for i, r in enumerate(found):
        assert (r["s1"], r["s2"], r["ts1"], r["ts2"]) == pytest.approx(
            (s.s1[i, 0].item(), s.s2[i, 0].item(), s.s1[i, 1].item(), s.s2[i, 1].item()), abs=1e-5
        )
        assert r["snr"] == pytest.approx(r["s1"] / max(r["s2"], 0.01))
        assert r["tsnr"] == pytest.approx(r["ts1"] / max(r["ts2"], 0.01))
    assert [r["caption_tokens"] for r in found] == [5, 5, 0, 92]
    assert found[3]["s1"] == found[3]["snr"] == 0 != found[3]["ts1"]
    json.dumps(found)


def test_summary_by_hand():
    rows = [
        dict(s1=0.4, s2=0.2, snr=2.0, ts1=0.3, ts2=0.3, tsnr=1.0, caption_tokens=5),
        dict(s1=0.2, s2=0.4, snr=0.5, ts1=0.1, ts2=0.2, tsnr=0.5, caption_tokens=0),
    ]
    found = discrimination_table(rows)
    assert [found[k] for k in DISCRIMINATION] == pytest.approx([30, 30, 1.25, 20, 25, 0.75])
    assert found["prefers"] == found["captions"] == 0.5
    assert found["n"] == 2
    assert all(lo <= found[k] <= hi for k in DISCRIMINATION for lo, hi in [found[f"{k}_ci"]])
    assert found["SNR_ci"] == pytest.approx([0.5, 2.0])


def test_samples_must_be_those_of_the_rows(clip, samples):
    rows = [answered(0, ""), answered(1, "")]
    with pytest.raises(ValueError, match=r"samples: 4 of them for 2 rows"):
        discrimination_rows(clip, rows, samples)
    with pytest.raises(
        ValueError, match=f"row 'mini-{VAL + 1}' meets sample 'mini-{VAL}'; give the samples"
    ):
        discrimination_rows(clip, rows[::-1], samples[:2])
    assert discrimination_rows(clip, [], []) == []


def test_strata_in_the_papers_order():
    rows = [
        answered(i, "", query_type=q, difficulty=d)
        for i, (q, d) in enumerate(
            [
                ("logic", "hard"),
                ("attribute", "easy"),
                ("logic", "easy"),
                ("relation", "medium"),
                ("new", "easy"),
            ]
        )
    ]
    assert list(split_strata(rows)) == [
        ("attribute", "easy"),
        ("relation", "medium"),
        ("logic", "easy"),
        ("logic", "hard"),
        ("new", "easy"),
    ]
    assert list(split_strata(rows, ["difficulty"])) == [("easy",), ("medium",), ("hard",)]
    assert len(split_strata(rows, ["difficulty"])[("easy",)]) == 3
    assert list(split_strata([dict(tags={})], ["kind"])) == [(None,)]


def test_table_has_a_line_for_every_method_in_every_stratum():
    rows = [
        answered(i, "", tokens=10 * i, difficulty=d) for i, d in enumerate(("easy", "hard", "hard"))
    ]
    t = stratified_table(
        dict(seg_zero=rows, dpad=[r | dict(s1=0.3, s2=0.2, snr=1.5, tsnr=1.0) for r in rows[1:]]),
        by=["difficulty"],
    )
    assert [(r[0], r[1], r[2]) for r in t.rows] == [
        ("easy", "seg_zero", "1"),
        ("hard", "seg_zero", "2"),
        ("hard", "dpad", "2"),
    ]
    assert t.rows[1][3].startswith("15.0 ± ")
    assert t.rows[2][5] == "30.0 ± 0.0"
    assert t.rows[1][5] == "–"
    assert t.head[:4] == ["difficulty", "method", "n", "tokens"]


def test_scatter_shows_every_sample_and_the_band():
    rows = [answered(i, "", tokens=t) for i, t in enumerate((2, 4, 9))]
    (panel,) = token_strata_plot(dict(dpad=rows), by=["difficulty"]).panels
    dots, line = panel.marks
    assert sorted(dots.y) == [2, 4, 9]
    assert dots.colour == METHOD_COLOURS["dpad"]
    assert list(line.y) == [5, 5]
    assert line.low == pytest.approx([5 - np.std([2, 4, 9])] * 2)
    assert line.high == pytest.approx([5 + np.std([2, 4, 9])] * 2)


def test_similarities_are_a_dot_a_sample():
    rows = [answered(i, "") | dict(s1=0.3, s2=0.2, ts1=0.1, ts2=0.2) for i in range(3)]
    caption, reasoning = similarity_scatter(dict(dpad=rows)).panels
    diagonal, dots = caption.marks
    assert list(diagonal.x) == list(diagonal.y)
    assert list(zip(dots.x, dots.y)) == [(20, 30)] * 3
    assert reasoning.marks[1].y == [10] * 3


def test_scatters_of_nothing_are_empty():
    assert token_strata_plot({}).panels[0].marks == []
    assert len(similarity_scatter({}).panels[0].marks) == 1
