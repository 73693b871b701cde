"""Small files in the forms that the published trainings read, and small models of the true classes.

The schemas are those of the peers' loaders and data cards; nothing here calls our readers.
"""

import io
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from qwen import QWEN_TEMPLATE, make_qwen_tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import dr2seg_lib
from dr2seg_lib.methods.registry import METHODS

SIDE = 840  # of the pictures in the hub's training sets
QUESTIONS = "the red thing", "what would one sit on", "the thing on the left", "what holds water"


def boxes(k: int) -> list[tuple]:
    "Two rectangles of a picture, in shares of its sides."
    shift = k % 4 / 20
    return [(0.1 + shift, 0.2, 0.4 + shift, 0.6), (0.6, 0.5 + shift, 0.9, 0.8 + shift)]


def pixels(box: tuple, w: int, h: int) -> list[int]:
    return [round(v * s) for v, s in zip(box, (w, h, w, h))]


def picture(k: int, w: int, h: int) -> Image.Image:
    image = Image.new("RGB", (w, h), (90 + 20 * (k % 4), 120, 140))
    draw = ImageDraw.Draw(image)
    for box, colour in zip(boxes(k), ((200, 30, 30), (240, 220, 60))):
        draw.rectangle(pixels(box, w, h), fill=colour)
    return image


def file_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def hub_image(k: int, w: int, h: int) -> dict:
    "As the library datasets writes an image."
    return dict(bytes=file_bytes(picture(k, w, h)), path=None)


def write_parquet(file: Path, rows: list[dict]):
    file.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def training_rows(solution, n: int) -> list[dict]:
    "Rows as both training sets of the hub have them; img_height and img_width are those before."
    return [
        dict(
            id=f"refcocog_{k}",
            problem=QUESTIONS[k % 4],
            solution=solution(k),
            image=hub_image(k, SIDE, SIDE),
            img_height=480,
            img_width=640,
        )
        for k in range(n)
    ]


def several_objects(k: int) -> str:
    "VisionReasoner_multi_object_7k_840: a JSON list, as many objects as the question has."
    found = [pixels(box, SIDE, SIDE) for box in boxes(k)[: 1 + k % 2]]
    return json.dumps(
        [dict(bbox_2d=b, point_2d=[(b[0] + b[2]) // 2, (b[1] + b[3]) // 2]) for b in found]
    )


def one_object(k: int) -> str:
    "refCOCOg_9k_840: a box and two points."
    x1, y1, x2, y2 = pixels(boxes(k)[0], SIDE, SIDE)
    x, y = (x1 + x2) // 2, (y1 + y2) // 2
    return f"<box>({x1},{y1}),({x2},{y2})</box>\n<points>({x - 40},{y}),({x + 40},{y})</points>"


def write_visionreasoner(root: Path) -> Path:
    home = root / "VisionReasoner_multi_object_7k_840"
    write_parquet(home / "data/train-00000-of-00001.parquet", training_rows(several_objects, 6))
    return home


def write_seg_zero(root: Path) -> Path:
    home = root / "refCOCOg_9k_840"
    write_parquet(home / "data/train-00000-of-00001.parquet", training_rows(one_object, 6))
    return home


def write_dpad(root: Path) -> Path:
    "3,000 questions of RefCOCOg in the list form, one object each."
    home = root / "refcocog_3k"
    rows = training_rows(lambda k: several_objects(2 * (k // 2)), 6)
    write_parquet(home / "data/train-00000-of-00001.parquet", rows)
    return home


def write_difficulties(root: Path) -> Path:
    "refcoco_train_labeled_merged.json of PixelThink's repository; of some pictures alone."
    rows = [
        dict(image_id=f"refcocog_{k}", text=QUESTIONS[k % 4], difficulty_score_model=2 + 2 * k)
        for k in range(4)
    ]
    (root / "refcoco_train_labeled_merged.json").write_text(json.dumps(rows))
    return root / "refcoco_train_labeled_merged.json"


def write_reasonseg(root: Path) -> Path:
    "LISA's ReasonSeg: a picture beside a labelme-like record; here and there pixels to ignore."
    home, w, h = root / "ReasonSeg", 320, 240
    for split, n in dict(train=6, val=3, test=2).items():
        (home / split).mkdir(parents=True)
        for k in range(n):
            x1, y1, x2, y2 = pixels(boxes(k)[0], w, h)
            corners = [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
            shapes = [dict(label="target", labels=["target"], shape_type="polygon", points=corners)]
            if k % 2:
                edge = [[x2, y1], [x2 + 9, y1], [x2 + 9, y2], [x2, y2]]
                shapes.append(
                    dict(label="ignore", labels=["ignore"], shape_type="polygon", points=edge)
                )
            text = [f"{QUESTIONS[k % 4]} in {split} {k}", f"the other words for {split} {k}"]
            record = dict(
                text=text[: 1 + k % 2],
                is_sentence=bool(k % 2),
                shapes=[s | dict(image_name=f"{split}_{k}.jpg", group_id=None) for s in shapes],
            )
            (home / split / f"{split}_{k}.json").write_text(json.dumps(record), encoding="cp1252")
            picture(k, w, h).save(home / split / f"{split}_{k}.jpg")
    return home


def write_reasonseg_of_the_hub(root: Path) -> Path:
    "Ricky06662/ReasonSeg_val: masks as lists of rows, a split called test."
    w, h, rows = 160, 120, []
    for k in range(3):
        x1, y1, x2, y2 = pixels(boxes(k)[0], w, h)
        mask = np.zeros((h, w), bool)
        mask[y1 : y2 + 1, x1 : x2 + 1] = True
        more = dict(image_id=f"{k}", ann_id="0", img_height=h, img_width=w)
        rows.append(dict(image=hub_image(k, w, h), text=QUESTIONS[k], mask=mask.tolist()) | more)
    write_parquet(root / "ReasonSeg_val/data/test-00000-of-00001.parquet", rows)
    return root / "ReasonSeg_val"


def write_refcoco(root: Path) -> Path:
    "RefCOCO as its authors released it: a pickle of references, COCO's instances, train2014."
    home, w, h = root / "refcoco", 160, 120
    (home / "images").mkdir(parents=True)
    refs, images, annotations = [], [], []
    for k in range(3):
        name = f"COCO_train2014_{k:012d}.jpg"
        picture(k, w, h).save(home / "images" / name)
        x1, y1, x2, y2 = pixels(boxes(k)[0], w, h)
        outline = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        area = dict(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1), iscrowd=0)
        images.append(dict(id=k, file_name=name, width=w, height=h))
        annotations.append(dict(id=10 + k, image_id=k, category_id=1, segmentation=outline) | area)
        said = ["the red thing", "thing at left"]
        sentences = [
            dict(sent=s, raw=s, tokens=s.split(), sent_id=2 * k + i) for i, s in enumerate(said)
        ]
        ids = dict(ref_id=k, ann_id=10 + k, image_id=k, category_id=1, split="testA")
        names = dict(file_name=f"COCO_train2014_{k:012d}_{k}.jpg", sent_ids=[2 * k, 2 * k + 1])
        refs.append(ids | names | dict(sentences=sentences))
    (home / "instances.json").write_text(
        json.dumps(dict(categories=[], images=images, annotations=annotations))
    )
    (home / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=0))
    return home


THOUGHT = "<think>The red thing lies at the left.</think>"
LIST = '<answer>[{"bbox_2d": [11, 22, 44, 67], "point_2d": [28, 44]}]</answer>'
SINGLE = '<answer>{"bbox": [11, 22, 44, 67], "points_1": [22, 44], "points_2": [33, 44]}</answer>'
ANSWERS = dict(  # what each method's format asks for
    visionreasoner=THOUGHT + LIST,
    dr2seg=THOUGHT + "<description>the red thing at the left</description>" + LIST,
    seg_zero=THOUGHT + SINGLE,
    pixelthink=THOUGHT + SINGLE,
    dpad="<caption>a red thing</caption>" + THOUGHT + SINGLE,
)


def make_qwen(tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    "Qwen2.5-VL at 200,000 parameters: true class, true patches, random weights."
    special = {
        f"{kind}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for kind, name in dict(
            image="image_pad",
            video="video_pad",
            vision_start="vision_start",
            vision_end="vision_end",
        ).items()
    }
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[2, 3, 3]),
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=64,
        fullatt_block_indexes=[1],
    )
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, **special
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def teach(model, tokenizer, method: str, steps: int = 160):
    "Lets a model say one answer to whatever a method asks, so that its format is often met."
    ends = tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
    said = tokenizer.encode(ANSWERS[method] + "<|im_end|>")
    asked = [tokenizer.encode(METHODS[method].prompt(question)) for question in QUESTIONS]
    learning = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = torch.optim.AdamW(learning, lr=5e-3)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    draw = random.Random(0)
    for step in range(steps):
        before = [[draw.randrange(600) for _ in range(24)] for _ in range(4)]
        ids = torch.tensor([row + asked[step % 4] + ends + said for row in before])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        tail = logits[:, -len(said) - 1 : -1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(tail, ids[:, -len(said) :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fall.step()
    assert loss < 0.03, f"the answer was not learned ({loss:.2f})"


def write_qwen(folder: Path, method: str) -> Path:
    "A checkpoint in the hub's layout, with Qwen's tokenizer, template and picture processor."
    torch.manual_seed(0)
    tokenizer = make_qwen_tokenizer()
    model = make_qwen(tokenizer)
    teach(model, tokenizer, method)
    size = dict(shortest_edge=56 * 56, longest_edge=112 * 112)
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=QWEN_TEMPLATE,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_sam2(folder: Path) -> Path:
    "SAM 2 at its smallest, its weights moved at random."
    own = Path(dr2seg_lib.__file__).parent / "weights" / "segmenter"
    folder.mkdir()
    shutil.copy(own / "config.json", folder)
    torch.manual_seed(0)
    weights = load_file(str(own / "model.safetensors"))
    moved = {
        k: w * (1 + 0.05 * torch.randn_like(w)) if w.is_floating_point() else w
        for k, w in weights.items()
    }
    save_file(moved, str(folder / "model.safetensors"))
    return folder


def write_clip(folder: Path) -> Path:
    "A CLIP of open_clip's class at ViT-B/32's form, made small; random weights."
    import open_clip

    sizes = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=2, width=32, patch_size=16, head_width=16),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2),
    )
    folder.mkdir()
    torch.manual_seed(0)
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=sizes)))
    weights = open_clip.CLIP(**sizes).state_dict()
    save_file(
        {k: v.contiguous() for k, v in weights.items()}, str(folder / "open_clip_model.safetensors")
    )
    return folder
