"Run folders with invented numbers and real samples, and a reader of HTML that checks it."

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from dr2seg_lib.core.files import write_jsonl
from dr2seg_lib.core.masks import encode_rle, iou, ratio
from dr2seg_lib.data.chains import think_aloud, think_concise, think_direct
from dr2seg_lib.data.mini import draw_problem
from dr2seg_lib.data.scenes import describe_objects
from dr2seg_lib.rollouts.parsing import format_response, parse_response
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.viewing.run_samples import sample_by_id

STRATA = "kind", "query_type", "dimension", "difficulty", "targets"


def tokens_of(text):
    return re.findall(r"</?\w+>| ?\w+|\W", text)


def answer(rng, puzzle, sample, verbose, shift=0, first=True):
    "A response as the embedded policy writes it, and the mask that follows from it."
    targets = puzzle.question.targets
    chain = think_concise(rng, puzzle.scene, puzzle.question)
    if verbose:
        chain = think_aloud(rng, puzzle.scene, puzzle.question).text
    if not first:
        chain = think_direct(targets)
    masks = puzzle.scene.masks()
    guess = np.roll(
        np.any([masks[puzzle.scene.things.index(t)] for t in targets], 0),
        rng.integers(-shift, shift + 1, 2) if shift else 0,
        (0, 1),
    )
    found = [
        type(t)(tuple(v // 2 for v in t.box), tuple(v // 2 for v in t.point))
        for t in sample.targets
    ]
    text = format_response(chain, describe_objects(targets, puzzle.scene) if first else None, found)
    return text, len(tokens_of(chain)), guess


def prediction(rng, seed, share, shift):
    puzzle, sample = draw_problem(seed), sample_by_id(f"mini-{seed}")
    text, n, guess = answer(rng, puzzle, sample, rng.random() < share, shift)
    if rng.random() < 0.03:
        text, guess = text[:60], guess & False
    i, u = iou(guess, sample.mask)
    return dict(
        sample=sample.id,
        query=sample.query,
        text=text,
        i=i,
        u=u,
        iou=ratio(i, u),
        tokens=n,
        format=float(guess.any()),
        answer_entropy=float(rng.gamma(2, 0.25 - 0.03 * (share < 0.5))),
        tags=sample.tags,
        rle=encode_rle(guess),
    )


def rollout(rng, step, seed, k, share):
    puzzle, sample = draw_problem(seed), sample_by_id(f"mini-{seed}")
    said = []
    for verbose, first in ((rng.random() < share, True), (False, False)):
        text, n, _ = answer(rng, puzzle, sample, verbose, first=first)
        tokens = tokens_of(text)
        said.append(
            dict(
                text=text,
                tokens=tokens,
                entropy=(rng.gamma(0.5, 0.7, len(tokens)) * (rng.random(len(tokens)) < 0.6))
                .round(4)
                .tolist(),
                think_tokens=n,
            )
        )
    right = float(rng.integers(0, 4))
    length = float(
        np.clip(
            (said[1]["think_tokens"] < said[0]["think_tokens"])
            - 0.05 * max(0, said[0]["think_tokens"] - 40),
            0,
            1,
        )
    )
    terms = dict(
        thinking_format=1.0,
        answer_format=2.0,
        non_repeat=1.0,
        accuracy=right,
        description=float(right > 1),
        length=length,
    )
    return dict(
        step=step,
        sample=sample.id,
        query=sample.query,
        tags=sample.tags,
        rollout=k,
        first=said[0],
        second=said[1],
        description=parse_response(said[0]["text"]).description,
        terms=terms,
        reward=(4 + right + terms["description"]) * length,
    )


def metrics(rng, step, end=30.0):
    go, noise = 1 - np.exp(-step / 18), rng.normal(size=9)
    n1 = 92 + (end - 92) * go + 3 * noise[0]
    terms = dict(
        thinking_format=0.97 + 0.025 * go,
        answer_format=1.95 + 0.04 * go,
        non_repeat=0.9 + 0.09 * go,
        accuracy=1.7 + 0.3 * go + 0.1 * noise[1],
        description=0.55 + 0.15 * go + 0.03 * noise[2],
        length=0.08 + 0.8 * go * (end < 50),
    )
    seconds = dict(
        first=0.3 + n1 / 250,
        second=0.45 + 0.02 * noise[3],
        reward=0.02,
        reference=0.12,
        update=0.5 + n1 / 400,
    )
    return dict(
        step=step,
        reward=(5.5 + terms["accuracy"] - 1.7) * (0.2 + 0.8 * go) + 0.1 * noise[4],
        terms=terms,
        accuracy=terms["accuracy"] / 3,
        tokens=n1,
        tokens_second=21 + noise[5],
        answer_entropy=0.53 - 0.08 * go + 0.012 * noise[6],
        kl=0.03 * go + 0.002 * noise[7] ** 2,
        loss=0.01 * noise[8],
        lr=5e-4,
        grad_norm=0.8 + 0.1 * noise[3] ** 2,
        seconds=seconds | dict(total=sum(seconds.values())),
        tokens_per_second=4200.0,
    )


def summary(rows):
    def mean(rs):
        return dict(
            gIoU=float(np.mean([r["iou"] for r in rs])),
            tokens=float(np.mean([r["tokens"] for r in rs])),
            n=len(rs),
        )

    iu, ci = np.array([(r["i"], r["u"]) for r in rows]).sum(0), {}
    for name, key in ("gIoU", "iou"), ("tokens", "tokens"):
        v = np.array([r[key] for r in rows])
        ci[f"{name}_ci"] = [
            v.mean() - 1.96 * v.std() / len(v) ** 0.5,
            v.mean() + 1.96 * v.std() / len(v) ** 0.5,
        ]
    strata = {
        tag: {
            str(v): mean([r for r in rows if r["tags"][tag] == v])
            for v in sorted({r["tags"][tag] for r in rows})
        }
        for tag in STRATA
    }
    return (
        mean(rows)
        | ci
        | dict(
            cIoU=float(iu[0] / iu[1]),
            answer_entropy=float(np.mean([r["answer_entropy"] for r in rows])),
            strata=strata,
        )
    )


def make_run(folder, steps=60, samples=96, recipe="dr2seg", seed=0, end=30.0):
    "A run folder such as training leaves, with invented numbers and real samples."
    rng = np.random.default_rng(seed)
    parameters = dict(
        recipe=recipe,
        model="embedded",
        segmenter="embedded",
        data="mini",
        seed=seed,
        steps=steps,
        prompts=16,
        samples=8,
        temperature=1.0,
        max_new_tokens=192,
        anchor=40.0,
        gamma=0.05,
        tune="lora",
        rank=64,
        lr=5e-4,
        kl=5e-3,
        advantage_scale="group",
        eval_samples=samples,
    )
    with Run.create(folder, parameters, seed, bar=False) as run:
        for step in range(1, steps + 1):
            run.log(metrics(rng, step, end))
            if step not in (1, steps // 2, steps // 2 + 1, steps):
                continue
            for s in range(2):
                group = [
                    rollout(rng, step, 1_000_000 + 7 * step + s, k, 0.75 - 0.7 * step / steps)
                    for k in range(8)
                ]
                rewards = np.array([r["reward"] for r in group])
                run.record(
                    [
                        r | dict(advantage=float(a))
                        for r, a in zip(
                            group, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
                        )
                    ]
                )
        results = {}
        for when, share, shift in ("before", 0.75, 3), ("after", 0.05, 2):
            rows = [prediction(rng, 2_000_000 + i, share, shift) for i in range(samples)]
            write_jsonl(Path(folder) / f"predictions_{when}.jsonl", rows)
            results[when] = summary(rows)
        run.results(results)
    return Path(folder)


class Reader(HTMLParser):
    "Checks that every element is closed, and notes names, attributes and text."

    void = {"meta", "img", "br", "use", "link", "input"}

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.links, self.words = [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes {self.open[-3:]}"
        assert self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


BAD = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</p></div><think>&lt;b\ud800\x00"
