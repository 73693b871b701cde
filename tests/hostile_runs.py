"""Run folders as a stranger could send them.

python tests/hostile_runs.py FOLDER [--n 60] [--seed 0]     writes some
"""

import argparse
import copy
import json
import os
import random
from pathlib import Path

import numpy as np

from dr2seg_lib.core.masks import encode_rle
from dr2seg_lib.data.mini import draw_sample

RUN = "window.__pwned=1;document.title='pwned';console.log('pwned')"
WORDS = [
    f"<script>{RUN}</script>",
    f'<img src=x onerror="{RUN}">',
    f'"><svg onload="{RUN}"></svg>',
    f"' autofocus onfocus='{RUN}' x='",
    f"</style><script>{RUN}</script>",
    f"</title></textarea></script><script>{RUN}</script>",
    f"--><img src=x onerror={RUN}>",
    f']]></svg><iframe srcdoc="<script>parent.{RUN}</script>">',
    f"javascript:{RUN}",
    f"[click](javascript:{RUN})",
    f'![x](x" onerror="{RUN})',
    "a|b|c",
    "`code` ``` ~~~",
    "one\ntwo\r\n| three |",
    "$\\href{javascript:" + RUN + "}{x}$",
    "$\\frac{1",
    "\\begin{x}\\write18{touch x}",
    "{0.__class__} {x} %s ${" + RUN + "}",
    "{{7*7}}",
    "__proto__",
    "constructor",
    "\u202egnp.\u2066",
    "nul\x00bell\x07",
    "half \ud83d",
    "x" * 5000,
    "&lt;script&gt;&#60;",
    "' OR 1=1",
    "../../../etc/passwd",
    "",
    f'a style="position:fixed" onmouseover={RUN}',
    f'<math><mtext><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror={RUN}&gt;">',
    "=cmd()",
    "N" + "a" * 30 + "N",
]
NUMBERS = [
    10**400,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    1e31,
    -5,
    2**63,
    0.5,
    True,
    None,
    [],
    [1, 2],
    {},
    {"a": {"b": [1]}},
    "12",
    "1e999",
    *WORDS[:6],
]
KINDS = "training", "evaluate", "rea2seg", "conditioning", "ablate"

# ---- runs that are whole


def said(n=30):
    return dict(
        text="<think>so it is this.</think><description>the ring</description>"
        '<answer>[{"bbox_2d": [10,10,60,60], "point_2d": [30,30]}]</answer>',
        tokens=["<think>", "so it", " is this.", "</think>", "…"],
        entropy=[0.0, 0.4, 1.2, 0.0, 0.1],
        think_tokens=n,
    )


def prediction(i, shift):
    s = draw_sample(2_000_000 + i)
    return dict(
        sample=s.id,
        query=s.query,
        text=said()["text"],
        i=10,
        u=40,
        iou=0.25 * (1 + (i + shift) % 3),
        tokens=30 + shift,
        answer_entropy=0.4,
        format=1.0,
        targets=1,
        tags=s.tags,
        rle=encode_rle(np.roll(s.mask, shift, 1)),
    )


def rollouts():
    return [
        dict(
            step=step,
            sample=f"mini-{1_000_000 + step}",
            query="what is round?",
            tags=dict(difficulty="easy", kind="x"),
            rollout=k,
            first=said(30 + k),
            second=said(9) if k else None,
            description="the ring" if k else None,
            terms=dict(accuracy=3.0 * k, description=1.0 * k, length=0.5),
            reward=2.0 * k,
            advantage=k - 0.5,
        )
        for step in (1, 2)
        for k in (0, 1)
    ]


def summary(gIoU=0.5):
    return dict(
        n=3,
        gIoU=gIoU,
        gIoU_ci=[0.4, 0.6],
        cIoU=0.5,
        cIoU_ci=[0.4, 0.6],
        tokens=30.0,
        tokens_ci=[28.0, 32.0],
        answer_entropy=0.4,
        cut=0.02,
        strata=dict(
            difficulty=dict(
                easy=dict(n=2, gIoU=0.5, tokens=20.0), hard=dict(n=1, gIoU=0.4, tokens=40.0)
            )
        ),
    )


def info(**parameters):
    return dict(
        status="done",
        parameters=dict(
            recipe="dr2seg",
            model="embedded",
            segmenter="embedded",
            data="mini",
            seed=0,
            max_new_tokens=192,
        )
        | parameters,
        seed=0,
        versions=dict(torch="2.0"),
        git="abc",
        started="2026-01-01T00:00:00+00:00",
        ended="2026-01-01T00:10:00+00:00",
        resumed=[dict(time="2026-01-01T00:05:00+00:00")],
        host="here",
        pid=1,
        error=None,
        frame=112,
    )


EVALUATION = dict(
    data="mini",
    format="MiniReasonSeg",
    split="val",
    protocol="lisa",
    split_note="The set names no splits: 20 % of it was held out.",
)
METRICS = [
    dict(
        step=s,
        reward=2.0 + s,
        terms=dict(accuracy=1.0, description=0.5, length=0.5),
        accuracy=0.5,
        tokens=60.0 - s,
        tokens_second=20.0,
        answer_entropy=0.4,
        kl=0.01,
        loss=0.1,
        lr=1e-3,
        grad_norm=0.5,
        seconds=dict(first=0.4, update=0.5, total=0.9),
    )
    for s in (1, 2, 3)
]
FILES = {"run.json", "results.json"}


def plan():
    holds = dict(weights=15.4, activations=2.5)
    stage = dict(peak_gib=17.9, holds_gib=holds, tflop=83.9, terabytes=5.9, seconds=8.2)
    stages = [stage | dict(stage=k, waits=dict(tolist=9)) for k in ("start", "first", "update")]
    sizes = dict(peak_gib=26.7, usable_gib=20.3, fits=False, nearest={"runtime.max_tokens": 1024})
    times = dict(steps=70, step_seconds=18.3, hours=0.4, gpu_hours=2.9)
    waits = dict(waits_per_step=0.49, waits_per_token=0.03)
    asked = dict(gpu="rtx4090", gpus=8, nodes=2)
    return dict(asked=asked, stages=stages, notes=["a word"]) | sizes | times | waits


def training(recipe="dr2seg"):
    rows = {
        when: [prediction(i, shift) for i in range(3)]
        for when, shift in (("before", 9), ("after", 1))
    }
    return {
        "run.json": info(recipe=recipe, steps=3, prompts=2, samples=2, eval_samples=3),
        "metrics.jsonl": copy.deepcopy(METRICS),
        "rollouts.jsonl": rollouts(),
        "plan.json": plan(),
        "progress.json": dict(stage="training", i=3, n=3, note="x", time=""),
        "predictions_before.jsonl": rows["before"],
        "predictions_after.jsonl": rows["after"],
        "results.json": dict(
            evaluation=EVALUATION,
            before=summary(0.4),
            after=summary(0.6),
            skipped={"a.json: broken": 2},
        ),
    }


def evaluate():
    return {
        "run.json": info(adapter="", protocol="lisa", split="val", samples=3),
        "predictions.jsonl": [prediction(i, 1) for i in range(3)],
        "results.json": dict(evaluation=EVALUATION, table="| a |") | summary(),
    }


def rea2seg():
    rows = []
    for i in range(3):
        s = draw_sample(2_000_000 + i)
        found = [
            dict(
                source=k,
                score=3.0,
                iou=0.5,
                text="<think>x</think><score>3</score>",
                rle=encode_rle(s.mask),
            )
            for k in ("direct", "peak")
        ]
        rows.append(
            dict(
                sample=s.id,
                query=s.query,
                tags=s.tags,
                text=said()["text"],
                grid=(np.eye(7) / 9).tolist(),
                candidates=found,
                direct=0.4,
                chosen=0.6,
                oracle=0.7,
                best=1,
                tokens_direct=30,
                tokens_scoring=20,
                seconds=dict(direct=1.0, scoring=0.5),
            )
        )
    line = dict(n=3) | {
        k: [0.4, 0.3, 0.5]
        for k in (
            "direct",
            "oracle",
            "chosen",
            "change",
            "candidates",
            "tokens_direct",
            "tokens_scoring",
            "seconds_direct",
            "seconds_more",
        )
    }
    return {
        "run.json": info(adapter="", candidates=8, overlap=0.8, split="val", samples=3),
        "predictions.jsonl": rows,
        "results.json": dict(table="| a |", summary=dict(spatial=line, all=line)),
    }


def conditioning():
    h = {k: [0.3, 0.4, None, 0.5] for k in ("I, Q", "I, Q, D", "I, D")}
    return {
        "run.json": info(adapters=["runs/x/checkpoints/step-000060"], split="val", samples=4),
        "results.json": {"start": h, "runs/x/checkpoints/step-000060": h},
    }


def ablate():
    files = {
        "run.json": info(recipes=["dr2seg"], seeds=[0, 1], settings=dict(gamma=0.1)),
        "results.json": dict(
            arms=dict(dr2seg=[summary()], visionreasoner=[summary()]), table="| a |", failed={}
        ),
    }
    for name in "dr2seg-s0", "dr2seg-s1", "visionreasoner-s0":
        files |= {f"{name}/{k}": v for k, v in training(name[:-3]).items()}
    return files


# ---- what is done to them


def places(value, way=()):  # of every leaf, and of every key, of parsed JSON
    if isinstance(value, dict):
        for k, v in value.items():
            yield (*way, k), "key"
            yield from places(v, (*way, k))
    elif isinstance(value, list):
        for k, v in enumerate(value):
            yield from places(v, (*way, k))
    else:
        yield (
            way,
            "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else "text",
        )


def at(value, way):
    for k in way:
        value = value[k]
    return value


def change(value, way, kind, rng, word):
    "Puts something else where something stands."
    holder, last = at(value, way[:-1]), way[-1]
    if kind == "key":
        holder[word] = holder.pop(last)
    elif kind == "text":
        holder[last] = word
    else:
        holder[last] = copy.deepcopy(rng.choice(NUMBERS))


PLAIN = (
    "sample",
    "data",
    "counts",
    "started",
    "ended",
    "time",
)  # so that the record still fits, and what is in it reaches a page
ASKED = (
    "recipe",
    "model",
    "adapter",
    "segmenter",
    "data",
    "steps",
    "protocol",
    "candidates",
    "adapters",
)  # without which it is another kind of run
NAMED = (
    "parameters",
    "versions",
    "terms",
    "seconds",
    "tags",
    "strata",
    "difficulty",
    "arms",
    "skipped",
)  # whose keys are names


def attacked(files, rng, how):
    "The files with every text changed, every number, or some of all."
    found = copy.deepcopy(files)
    for value in found.values():
        where = [(w, k) for w, k in places(value) if w]
        rng.shuffle(where)
        if how == "texts":
            where = [
                (w, k)
                for w, k in where
                if k == "text"
                and w[-1] not in PLAIN
                or k == "key"
                and len(w) > 1
                and w[-2] in NAMED
                and w[-1] not in ASKED
            ]
        elif how == "numbers":
            where = [(w, k) for w, k in where if k == "number" and rng.random() < 0.5]
        elif how == "one":
            where = where[:1]
        else:
            where = [(w, k) for w, k in where if rng.random() < 0.06]
        for way, kind in where:
            try:
                change(value, way, kind, rng, rng.choice(WORDS))
            except (KeyError, IndexError, TypeError):
                pass  # it went with its holder
    return found


RAW = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"<script>"',
    "number": b"12",
    "torn": None,
    "latin": "é".encode("latin-1"),
    "utf16": '{"status": "done"}'.encode("utf-16"),
    "deep": b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deeper": b'{"step":1,"x":' + b"[" * 200 + b"]" * 200 + b"}",
    "digits": b'{"step": ' + b"9" * 6000 + b"}",
    "noise": bytes(range(256)) * 40,
    "bom": b'\xef\xbb\xbf{"step": 1}',
    "lines": b"\n\n\r\n{}\n{}\n[]\n",
    "twice": b'{"step":1,"step":"<img src=x onerror=alert(1)>"}\n',
    "gone": None,
    "folder": None,
    "pipe": None,
    "link": None,
}


def spoil(path, how):
    "Makes a file something else than a whole file of JSON."
    whole = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link":
        path.symlink_to("nowhere")
    elif how == "torn":
        path.write_bytes(whole[: len(whole) * 2 // 3])
    elif how != "gone":
        path.write_bytes(RAW[how])


NAMES = [
    "<img src=x onerror=alert(1)>",
    "a\nb",
    "name`|$x$[l](javascript:alert(1))",
    "'\" onload=alert(1)",
    "ü" + "x" * 200,
    b"\xff\xfe-bytes",
    "&amp;",
    "-s0",
]


def write(folder, files):
    for name, value in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = value if name.endswith("l") else [value]
        path.write_text(
            "".join(
                json.dumps(r, **({} if name.endswith("l") else dict(indent=1))) + "\n" for r in rows
            )
        )
    return Path(folder)


def cases(root, n=60, seed=0):
    "Hostile run folders below `root`, in turn of every kind and every manner."
    rng, root, raw = random.Random(seed), Path(root), list(RAW)
    for i in range(n):
        kind, how = (
            KINDS[i % len(KINDS)],
            ("texts", "numbers", "some", "raw", "one")[i // len(KINDS) % 5],
        )
        name = rng.choice(NAMES) if i % 3 == 0 else "run"
        folder = root / str(i) / (name if isinstance(name, str) else os.fsdecode(name))
        files = globals()[kind]()
        write(folder, files if how == "raw" else attacked(files, rng, how))
        if how == "raw":
            for k, file in enumerate(sorted(files)):
                if rng.random() < 0.6:
                    spoil(folder / file, raw[(i + k) % len(raw)])
        yield folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for folder in cases(args.folder, args.n, args.seed):
        print(repr(str(folder)))
