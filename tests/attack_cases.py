"""What is attacked: each kind writes a hostile input below `case.input` and returns a function.

The function uses that input. It may end well, or raise what the command line turns into a sentence;
`attack.py` judges how it ended.
"""

import io
import json
import os
import shutil
import socketserver
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import hostile
import numpy as np
import torch
from PIL import Image

from dr2seg_lib.cli import main
from dr2seg_lib.commands.parameters import old_names_in, parameter_defaults
from dr2seg_lib.commands.parameters_cell import find_experiment, free_parameters
from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.data.datasets import detect_format, load_data, open_data
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.records import BrokenRecord
from dr2seg_lib.evaluation.config import EvaluateConfig
from dr2seg_lib.evaluation.evaluate import answer_greedily, evaluate
from dr2seg_lib.methods.registry import METHODS
from dr2seg_lib.models import http_client
from dr2seg_lib.models.loading import load_policy
from dr2seg_lib.models.requirements import EMBEDDED
from dr2seg_lib.models.vllm_client import ServedPolicy
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.runs.status import read_record, run_status
from dr2seg_lib.runs.verify import inherit
from dr2seg_lib.segmenters.loading import load_segmenter
from dr2seg_lib.training.config import TrainConfig
from dr2seg_lib.training.trainer import train
from dr2seg_lib.viewing.compare import compare
from dr2seg_lib.viewing.inspector import inspect
from dr2seg_lib.viewing.live import live
from dr2seg_lib.viewing.report import write_report

W, H = 40, 30
PHOTO = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
BOX = [[5, 6], [20, 6], [20, 16], [5, 16]]


class Flaw(Exception):
    "Something that must not be, found by a case itself."


@dataclass
class Case:
    "One attack: where it happens, what it draws from, and what has been said of it."

    root: Path
    templates: Path
    rng: Random
    notes: list = field(default_factory=list)
    may_change: tuple = ()  # of the input's files, by name

    def __post_init__(self):
        self.input = self.root / "input"
        self.witness = self.root / "witness" / "secret.txt"
        self.canary = self.root / "canary"
        for folder in self.input, self.witness.parent:
            folder.mkdir(parents=True)
        self.witness.write_text("nobody's business")

    def say(self, note: str):
        self.notes.append(note)

    def json(self, tree, times=None) -> bytes:
        return hostile.json_bytes(self.rng, tree, self.say, times)

    def harm(self, path: Path):
        hostile.harm(self.rng, path, self.witness, self.say)

    def now_and_then(self, share: float) -> bool:
        return self.rng.random() < share


# ---- what several kinds do


def command(*argv) -> Callable:
    "A command as typed; returns its exit code."
    words = [str(word) for word in argv]
    return lambda: main(words)


def no_notebook(notebook, out, parameters):
    "Stands in for papermill: what a command checks before it is what is attacked."
    return None, 0


def read_all(path: Path):
    "Opens every split of a data set and reads every sample."
    kind = detect_format(path)
    for split in list(kind.splits(path))[:4]:
        data = open_data(path, split)
        for i in range(len(data)):
            try:
                data[i]
            except BrokenRecord:
                pass  # that is its place


EVALUATED = dict(batch_size=4, max_new_tokens=4)
TRAINED = dict(
    steps=1,
    prompts=2,
    samples=2,
    max_new_tokens=4,
    rank=2,
    alpha=2,
    eval_samples=2,
    segmenter="grabcut",
)


def use(case: Case, path: Path) -> Callable:
    "What one does with a data set: check it, read it, evaluate on it, train on it."
    kind = case.rng.choices(("check", "read", "evaluate", "train"), (8, 8, 3, 1))[0]
    case.say(kind)
    if kind == "check":
        return command("check", path)
    if kind == "read":
        return lambda: read_all(path)
    if kind == "evaluate":
        return lambda: evaluate_on(path)
    return lambda: train(TrainConfig(data=str(path), **TRAINED), case.root / "run")


def evaluate_on(path: Path):
    data = load_data(str(path), "val")
    evaluate(
        load_policy("embedded"),
        load_segmenter("grabcut"),
        data,
        METHODS["dr2seg"].prompt,
        **EVALUATED,
    )


def encoded(image=PHOTO, format="PNG", **how) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format, **how)
    return out.getvalue()


def outline(case: Case) -> list:  # [[x, y], …]
    points = hostile.polygon(case.rng)
    case.say(f"a polygon of {len(points)} points like {points[:2]}")
    return points


# ---- data sets


def reasonseg(case: Case) -> Callable:
    "ReasonSeg's folders."
    root, rng = case.input / "ReasonSeg", case.rng
    for split, names in dict(train="ab", val="cd").items():
        (root / split).mkdir(parents=True)
        for name in names:
            record = dict(
                text=["what is it", "the cup"],
                is_sentence=False,
                shapes=[
                    dict(label="target", points=BOX),
                    dict(label="ignore", points=[[1, 1], [9, 1], [9, 9]]),
                ],
            )
            odd = case.now_and_then(0.2)
            if odd:
                record["shapes"][0]["points"] = outline(case)
            (root / split / f"{name}.jpg").write_bytes(encoded(format="JPEG"))
            (root / split / f"{name}.json").write_bytes(
                case.json(record, None if name in "ac" and not odd else 0)
            )
    if case.now_and_then(0.5):
        case.harm(rng.choice(sorted(root.glob("*/*"))))
    return use(case, rng.choice((root, root, root / "val")))


def own(case: Case) -> Callable:
    "A folder of one's own with data.jsonl."
    folder, rng = case.input / "mine", case.rng
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(encoded())
    (folder / "m.png").write_bytes(encoded((PHOTO > 99).astype(np.uint8) * 255))
    drawn = dict(polygon=[BOX], mask="m.png", ignore=dict(size=[H, W], counts=[0, 40, W * H - 40]))
    rows = []
    for i in range(6):
        row = dict(id=f"r{i}", image="images/a.png", query="what is it", tags=dict(kind="a")) | (
            {"split": rng.choice(("train", "val"))} if i % 2 else {}
        )
        row |= {k: drawn[k] for k in rng.sample(sorted(drawn), rng.choice((1, 2)))}
        odd = rng.choice(("polygon", "mask", "query", "anything", "anything", None, None))
        if odd == "polygon":
            row["polygon"] = [outline(case)]
        if odd == "mask":
            row["mask"] = hostile.run_lengths(rng, W, H)
        if odd == "query":
            row["query"] = hostile.text(rng)
        rows.append(case.json(row, None if odd == "anything" else 0))
    (folder / "data.jsonl").write_bytes(
        b"\n".join(rows) + rng.choice((b"", b"\n", b"\n\n", b"\xff"))
    )
    if case.now_and_then(0.4):
        case.harm(rng.choice(sorted(p for p in folder.rglob("*") if p.is_file())))
    return use(case, folder)


def refcoco(case: Case) -> Callable:
    "RefCOCO's pickle with its instances."
    import pickle

    folder, rng = case.input / "refcoco", case.rng
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.jpg").write_bytes(encoded(format="JPEG"))
    refs = [
        dict(
            ref_id=i,
            ann_id=70 + i,
            image_id=7,
            split=rng.choice(("train", "val", "testA")),
            category_id=1,
            sentences=[dict(sent="the cup", raw="x")],
        )
        for i in range(4)
    ]
    areas = [[10.0, 10.0, 30.0, 10.0, 30.0, 20.0], dict(size=[H, W], counts=[0, 50, W * H - 50])]
    annotations = [
        dict(id=70 + i, image_id=7, segmentation=[areas[0]] if i % 2 else areas[1])
        for i in range(4)
    ]
    odd = rng.choice(("polygon", "mask", "anything", None))
    if odd == "polygon":
        annotations[0]["segmentation"] = [[v for p in outline(case) for v in p]]
    if odd == "mask":
        annotations[1]["segmentation"] = hostile.run_lengths(rng, W, H)
    instances = dict(
        images=[dict(id=7, file_name="a.jpg", width=W, height=H)],
        annotations=annotations,
        categories=[],
    )
    (folder / "instances.json").write_bytes(case.json(instances, None if odd == "anything" else 0))
    bad = hostile.pickles(case.canary)
    name = rng.choice(sorted(bad)) if case.now_and_then(0.4) else None
    if name:
        case.say(f"pickle: {name}")
    try:
        refs = json.loads(case.json(refs, None if case.now_and_then(0.5) else 0))
    except (ValueError, RecursionError):
        case.say("which Python itself cannot read: left out")
    (folder / "refs(unc).p").write_bytes(
        bad[name] if name else pickle.dumps(refs, rng.choice((0, 2, 4)))
    )
    if case.now_and_then(0.3):
        case.harm(rng.choice(sorted(p for p in folder.rglob("*") if p.is_file())))
    return use(case, folder)


SOLUTIONS = (
    '[{"bbox_2d": [10, 20, 300, 400], "point_2d": [50, 60], "label": "x"}]',
    "<box>(10,20),(300,400)</box> <points>(50,60),(70,80)</points>",
)


def solution(case: Case) -> str:
    "A training set's answer, sometimes after a change."
    said = case.rng.choice(SOLUTIONS)
    if case.now_and_then(0.5):
        return said
    if said[0] == "[":
        return case.json(json.loads(said)).decode()
    case.say("odd tags")
    return said.replace(
        case.rng.choice(("10", "300", "(50,60)", "<points>", ",")),
        case.rng.choice(("-1", "9" * 400, "", "(", "1e9", "٣")),
    )


def writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # as Arrow takes it


def parquet_rows(case: Case, form: str) -> list:
    "Rows of the hub's forms: VisionReasoner's and Seg-Zero's training sets, the evaluation sets."
    rng, rows = case.rng, []
    for i in range(4):
        image = encoded() if case.now_and_then(0.8) else hostile.spoil(rng, encoded(), case.say)
        row = dict(image=dict(bytes=image, path=None), img_height=H, img_width=W, id=str(i))
        query = writable(hostile.text(rng)) if case.now_and_then(0.2) else "the cup"
        if form == "train":
            rows.append(row | dict(problem=query, solution=writable(solution(case))))
        else:
            mask = (
                rng.choice(
                    ([[True] * W] * H, [[False] * W] * H, [[True] * H] * W, [], [[True]], None)
                )
                if case.now_and_then(0.4)
                else (PHOTO[..., 0] > 99).tolist()
            )
            rows.append(row | dict(text=query, mask=mask, image_id="7", ann_id=str(i)))
    return rows


def parquet(case: Case) -> Callable:
    "A parquet set of the hub."
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, form = case.rng, case.rng.choice(("train", "eval"))
    file = (
        case.input
        / "set"
        / rng.choice(
            ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet", "data/train.parquet")
        )
    )
    file.parent.mkdir(parents=True)
    rows = parquet_rows(case, form)
    table = pa.Table.from_pylist(rows)
    name = rng.choice(table.column_names)
    if case.now_and_then(0.2):
        table = table.drop_columns([name])
        case.say(f"no column {name}")
    elif case.now_and_then(0.2):
        table = table.set_column(
            table.column_names.index(name),
            name,
            pa.array([rng.choice((None, 1, 2**40)) for _ in rows], pa.int64()),
        )
        case.say(f"numbers in column {name}")
    pq.write_table(
        table,
        file,
        row_group_size=rng.choice((1, 2, 100)),
        compression=rng.choice(("snappy", "zstd", "none")),
    )
    if case.now_and_then(0.5):
        case.harm(file)
    return use(case, rng.choice((case.input / "set", file)))


# ---- pictures and questions

MODES = "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"


def drawn(case: Case) -> bytes:
    "A picture in some mode and format, or a claim of one."
    rng = case.rng
    size = rng.choice(((W, H), (1, 1), (1, 2000), (2000, 1), (3, 3)))
    mode, format = (
        rng.choice(MODES),
        rng.choice(("PNG", "PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "ICO", "PPM")),
    )
    out, image = io.BytesIO(), Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3))
    try:
        (
            image.convert("L").convert(mode)
            if mode in ("I;16", "F", "PA", "I")
            else image.convert(mode)
        ).save(out, format)
    except (OSError, ValueError, KeyError):
        out, mode, format = io.BytesIO(encoded()), "RGB", "PNG"
    data = bytearray(out.getvalue())
    case.say(f"{format} {mode} {size}")
    if format == "PNG" and case.now_and_then(0.2):
        import zlib

        data[16:24] = rng.choice(
            (
                b"\0\0\xff\xff\0\0\xff\xff",
                b"\x7f\xff\xff\xff\x7f\xff\xff\xff",
                b"\0\0\0\0\0\0\0\0",
                b"\0\0\x1f\xff\0\0\x1f\xff",
            )
        )
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        case.say("claims another size")
    return bytes(data) if case.now_and_then(0.4) else hostile.spoil(rng, bytes(data), case.say)


def picture(case: Case) -> Callable:
    "A photograph to segment by a box."
    path = case.input / case.rng.choice(
        ("a.png", "a.jpg", "noending", "a.b.webp", "x" * 240, "ü☃.png")
    )
    path.write_bytes(drawn(case))
    if case.now_and_then(0.1):
        hostile.misplace(case.rng, path, case.witness, case.say)
    box = case.rng.choice(
        (
            "0,0,30,20",
            "1,1,2,2",
            "0,0,0,0",
            "5,5,1,1",
            "-1,0,3,3",
            "nan,0,1,1",
            "1e308,1,2,3",
            "0,0,39,29",
            "a,b",
            "٣,1,9,9",
            "0,0,1999,0",
        )
    )
    case.say(f"box {box}")
    more = (
        ["--point", case.rng.choice(("1,1", "nan,1", "x", "1e400,1"))]
        if case.now_and_then(0.2)
        else []
    )
    return command(
        "segment",
        path,
        "what",
        f"--box={box}",
        "--out",
        case.root / case.rng.choice(("out", "out/far", "witness/secret.txt")),
        *more,
    )


def question(case: Case) -> Callable:
    "A question of hostile text, to the embedded policy."
    rng = case.rng
    query = "".join(
        rng.choice((lambda: hostile.text(rng), lambda: "what is red? "))()
        for _ in range(rng.choice((1, 2, 3)))
    )
    if case.now_and_then(0.15):
        query = (query or "x") * (100_000 // max(1, len(query)))
    case.say(f"{len(query)} letters, {query[:60]!r}")
    folder = case.input / "mine"
    folder.mkdir()
    (folder / "a.png").write_bytes(encoded())
    (folder / "data.jsonl").write_text(
        json.dumps(dict(id="a", image="a.png", query=query, polygon=[BOX]))
    )
    return rng.choice(
        (
            lambda: evaluate_on(folder),
            command("check", folder),
            command(
                "segment",
                folder / "a.png",
                query,
                "--out",
                case.root / "out",
                "--segmenter",
                "grabcut",
                "--max-new-tokens",
                "4",
            ),
        )
    )


# ---- run folders

ROWS = "metrics.jsonl", "rollouts.jsonl", "predictions_before.jsonl", "predictions_after.jsonl"


def change_rows(case: Case, path: Path):
    "Changes within one line of a file of rows, or of which lines there are."
    lines, rng = path.read_bytes().splitlines(keepends=True), case.rng
    if not lines:
        return
    at, kind = (
        rng.randrange(len(lines)),
        rng.choice(("change", "change", "change", "drop", "double", "swap", "cut", "blank")),
    )
    case.say(f"{kind} line {at} of {path.name}")
    if kind == "change":
        lines[at] = case.json(json.loads(lines[at])) + b"\n"
    elif kind == "drop":
        del lines[at]
    elif kind == "double":
        lines.insert(at, lines[at])
    elif kind == "swap":
        lines.reverse()
    elif kind == "cut":
        lines[-1] = lines[-1][: len(lines[-1]) // 2]
    else:
        lines.insert(at, b"\n")
    path.write_bytes(b"".join(lines))


def change_run(case: Case, folder: Path):
    "One or two accidents in a run's folder."
    for _ in range(case.rng.choice((1, 1, 2))):
        kind = case.rng.choice(("record", "record", "results", "rows", "rows", "file"))
        if kind == "rows":
            change_rows(
                case,
                folder
                / case.rng.choice([n for n in ROWS if (folder / n).is_file()] or ["run.json"]),
            )
        elif kind == "file":
            case.harm(case.rng.choice(sorted(p for p in folder.iterdir() if p.is_file())))
        else:
            path = folder / dict(record="run.json", results="results.json")[kind]
            case.say(f"in {path.name}:")
            try:
                path.write_bytes(case.json(json.loads(path.read_bytes())))
            except (OSError, ValueError, RecursionError):
                return  # it has been changed before


def copied(case: Case, name: str = "run") -> Path:
    "A run as it was left, with a marked record now and then."
    folder = case.input / "runs" / name
    shutil.copytree(case.templates / "run", folder)
    if case.now_and_then(0.4):
        mark(case, folder)
    if case.now_and_then(0.15):
        record = json.loads((folder / "run.json").read_text())
        file = case.input / "canary.py"
        harmful = f"open({str(case.canary)!r}, 'w').close()\n"
        file.write_text(f"from dr2seg_lib.methods.dr2seg import dr2seg as r\n{harmful}")
        record["parameters"] |= (
            dict(recipe=f"{file}:r")
            if case.now_and_then(0.5)
            else dict(data="nobody/nothing", eval_data="nobody/nothing")
        )
        (folder / "run.json").write_text(json.dumps(record))
        case.say("names code or a set of the hub")
    return folder


def mark(case: Case, folder: Path):
    "Puts markup where values are: anywhere in one of the files."
    path = folder / case.rng.choice(("run.json", "results.json", *ROWS))
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    for k, line in enumerate(lines):
        tree = json.loads(line)
        for _ in range(case.rng.choice((1, 3, 9))):
            at = case.rng.choice(hostile.places(tree))
            holder = tree
            for key in at[:-1]:
                holder = holder[key]
            if isinstance(holder, dict) and case.now_and_then(0.3):
                holder[hostile.MARK] = holder.pop(at[-1])
            else:
                holder[at[-1]] = hostile.MARK
            if not k:
                case.say(f"markup at {at} of {path.name}")
        lines[k] = json.dumps(tree)
    path.write_text("\n".join(lines) + "\n")


class Tags(HTMLParser):
    "Finds the mark where it has become a part of the page."

    def handle_starttag(self, tag, attrs):
        if tag == "canary-tag" or any("canary" in str(v) and k.startswith("on") for k, v in attrs):
            raise Flaw(f"a value of the record became a part of the page: <{tag}>")


def page(html: str):
    Tags().feed(html)


def looked(case: Case, folder: Path) -> Callable:
    "What one looks at a run with."

    def see_report():
        page(write_report(folder).read_text())

    def see_inspector():
        view = inspect(folder)
        for source in list(view.index):
            view.source, view.at = source, 1
            json.dumps([view.about, view.index, view.shown], allow_nan=False)
        view.still()

    def see_comparison():
        page(compare([folder, case.templates / "run"]).html)

    def see_live():
        live(folder).close()

    def see_table():
        page("".join(_printed(main(["tables", "--format", "html", str(folder)]))))

    does = case.rng.choices(
        (
            see_report,
            see_inspector,
            see_comparison,
            see_live,
            see_table,
            command("runs", folder.parent),
            command("tables", folder),
        ),
        (4, 4, 3, 3, 3, 3, 3),
    )[0]
    case.say(getattr(does, "__name__", "command"))
    return does


def _printed(code) -> list:
    import sys

    sys.stdout.flush()
    if code:
        raise SystemExit(code)
    return [Path("stdout").read_text(errors="replace")]


def view(case: Case) -> Callable:
    "A run's folder from elsewhere, looked at: nothing is fetched, run or changed."
    folder = copied(case)
    if not case.notes or case.now_and_then(0.3):
        change_run(case, folder)
    shutil.copytree(case.templates / "run", case.input / "runs" / "good")
    case.may_change = "report.html", ".lock"
    return forbidding_fetches(looked(case, folder))


def forbidding_fetches(does: Callable) -> Callable:
    "Looking at what others have made asks nobody on the network."

    def done():
        import huggingface_hub

        def fetch(*args, **kwargs):
            raise Flaw(f"the hub was asked for {args}")

        huggingface_hub.snapshot_download = huggingface_hub.hf_hub_download = fetch
        return does()

    return done


def resume(case: Case) -> Callable:
    "A resume of a run's folder, by the command (as far as the notebook) or by the library."
    folder = case.input / "run"
    shutil.copytree(case.templates / "run", folder)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps(
            record | dict(status="interrupted", parameters=record["parameters"] | dict(steps=3))
        )
    )
    if case.now_and_then(0.6):
        change_rows(case, folder / case.rng.choice(ROWS[:2]))
    else:
        change_run(case, folder)
    case.may_change = (
        "run.json",
        "*.jsonl",
        "results.json",
        "progress.json",
        ".lock",
        ".cli.lock",
        "notebook.ipynb",
        "adapter_config.json",
        "README.md",
        "*.safetensors",
        "manifest.json",
        "optimizer.pt",
        "error.log",
    )
    if case.now_and_then(0.3):
        return command("run", "train", "--resume", "--out", folder)
    before = {
        n: (folder / n).read_bytes()
        for n in ("metrics.jsonl", "rollouts.jsonl")
        if (folder / n).is_file()
    }

    def go_on():
        try:
            config = TrainConfig(**free_parameters(read_record(folder)["parameters"]))
        except KeyError:
            raise ValueError("no parameters; restore the record") from None
        try:
            train(config, folder, resume=True)
        except (ValueError, OSError):
            kept(before, folder)
            raise
        steps = [row["step"] for row in read_jsonl(folder / "metrics.jsonl")]
        if run_status(folder) == "done" and steps != list(range(1, config.steps + 1)):
            raise Flaw(f"done, with the steps {steps[:9]} in its metrics")

    case.say("train")
    return go_on


def kept(before: dict, folder: Path):
    "A refused resume leaves every whole line where it was."
    for name, text in before.items():
        now = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if not now.startswith(text[: text.rfind(b"\n") + 1]):
            raise Flaw(f"a refused resume has changed {name}")


def checkpoint(case: Case) -> Callable:
    "A checkpoint from elsewhere."
    folder, rng = case.input / "run", case.rng
    shutil.copytree(case.templates / "run", folder)
    newest = folder / "checkpoints" / "step-000002"
    kind = rng.choice(("file", "file", "file", "manifest", "config", "name", "numbers", "pickle"))
    case.say(kind)
    if kind == "file":
        case.harm(rng.choice(sorted(p for p in newest.iterdir() if p.is_file())))
    elif kind in ("manifest", "config"):
        path = newest / dict(manifest="manifest.json", config="adapter_config.json")[kind]
        path.write_bytes(case.json(json.loads(path.read_bytes())))
    elif kind == "name":
        newest.rename(
            newest.with_name(
                rng.choice(
                    (
                        "step-abc",
                        "step-",
                        "step-99999999999999999999",
                        "step-000002x",
                        "step--1",
                        "step-٣",
                    )
                )
            )
        )
    elif kind == "pickle":
        (newest / "optimizer.pt").write_bytes(
            rng.choice(list(hostile.pickles(case.canary).values()))
        )
    else:
        from safetensors.torch import load_file, save_file

        weights = load_file(newest / "adapter_model.safetensors")
        save_file(
            {k: v * float(rng.choice(("nan", "inf", "1e38", "0"))) for k, v in weights.items()},
            newest / "adapter_model.safetensors",
        )
    if kind != "manifest" and case.now_and_then(0.6):
        sealed(newest, case)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(
        json.dumps(
            record | dict(status="interrupted", parameters=record["parameters"] | dict(steps=3))
        )
    )
    case.may_change = ("*",)
    name = next((p for p in sorted((folder / "checkpoints").glob("step-*"), reverse=True)), newest)

    def load():
        load_policy("embedded", EvaluateConfig(**inherit(dict(adapter=str(name)))[0]).model.adapter)

    def go_on():
        train(TrainConfig(**record["parameters"] | dict(steps=3)), folder, resume=True)

    return rng.choice(
        (
            load,
            load,
            go_on,
            lambda: latest_checkpoint(folder),
            command("run", "evaluate", "-p", "adapter", name, "--out", case.root / "out"),
        )
    )


def sealed(folder: Path, case: Case):
    "A manifest that agrees with what is there."
    import hashlib

    path = folder / "manifest.json"
    if not path.is_file():
        return
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        return
    files = [
        p
        for p in folder.iterdir()
        if p.is_file() and p.name != "manifest.json" and not p.is_symlink()
    ]
    path.write_text(
        json.dumps(
            manifest
            | dict(files={p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
        )
    )
    case.say("sealed")


# ---- servers


class Server(socketserver.ThreadingTCPServer):
    "Lists its models as it should, and then says whatever the case wants it to say, byte for byte."

    daemon_threads = allow_reuse_address = True

    def __init__(self, reply: Callable, models: Callable):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.models, self.url = (
            reply,
            models,
            f"http://127.0.0.1:{self.server_address[1]}",
        )
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            line, length = self.rfile.readline(), 0
            while (header := self.rfile.readline()).strip():
                if header.lower().startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            self.rfile.read(length)
            does = self.server.models if b"/v1/models" in line else self.server.reply
            does(self.wfile)
        except OSError:
            pass  # who asked has hung up


def http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _drip(stream):
    import time

    stream.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    while True:
        stream.write(b" ")
        time.sleep(0.2)


def _flood(stream):
    stream.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    for _ in range(3000):
        stream.write(b"[" * 2**17)


def odd_replies(case: Case, good: dict) -> list:  # of functions that write to a stream
    "What a server may send instead of its reply."
    rng, body = case.rng, json.dumps(good).encode()
    texts = [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"<html><h1>Bad gateway</h1></html>",
        b"[" * 10**6,
        b"\xff\xfe",
        case.json(good),
        case.json(good),
        case.json(good),
        hostile.spoil(rng, body, case.say),
    ]
    whole = [http(t) for t in texts]
    whole += [
        http(t, status)
        for t in texts[4:6]
        for status in ("500 Oops", "404 Not Found", "429 Slow down", "401 Who are you")
    ]
    whole += [
        http(b"", "302 Found", "Location: http://example.invalid/x"),
        http(b"", "307 Go", "Location: http://127.0.0.1:9/"),
        http(body, "200 OK", "Content-Encoding: gzip"),
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\nx",
        b"HTTP/1.1 200 " + b"x" * 10**6 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10**4 + b"\r\n{}",
        http(b'{"error": {"message": "' + hostile.MARK.encode() + b'\\u001b[31m\\n"}}', "400 Bad"),
        http(json.dumps(good | dict(choices=good["choices"] * 3)).encode()),
    ]

    def written(data):
        return lambda stream: stream.write(data)

    return [*map(written, whole), _drip, _flood]


def served(case: Case) -> Callable:
    "A server's replies, to an evaluation's first question."
    good = json.loads((case.templates / "reply.json").read_text())
    listed = dict(object="list", data=[dict(id="policy", root=str(EMBEDDED), parent=None)])
    at = case.rng.choice(("models", "reply", "reply", "reply"))
    choices = odd_replies(case, listed | dict(choices=[]) if at == "models" else good)
    number = case.rng.randrange(len(choices))
    case.say(f"{at}: {number} of {len(choices)}")
    fine = {
        "models": lambda s: s.write(http(json.dumps(listed).encode())),
        "reply": lambda s: s.write(http(json.dumps(good).encode())),
    }
    says = fine | {at: choices[number]}

    def ask():
        hurry()
        url = Server(says["reply"], says["models"]).url
        served = ServedPolicy(load_policy("embedded"), url, "embedded", case.root / "served")
        sample = MiniReasonSeg("val")[0]
        answer_greedily(served, [sample], METHODS["dr2seg"].prompt, 6)

    return ask


def hurry():
    "A server's patience, shortened."
    limits = dict(RETRY_WAITS=(0.01, 0.02), REPLY_SECONDS=3)
    assert not [name for name in limits if not hasattr(http_client, name)]
    for name, seconds in limits.items():
        setattr(http_client, name, seconds)


# ---- the command line


def names(case: Case) -> list:
    "What may stand for a path or a name."
    (case.input / "file").write_text("x")
    (case.input / "folder").mkdir(exist_ok=True)
    if not (case.input / "pipe").exists():
        os.mkfifo(case.input / "pipe")
    return (
        [str(case.input / n) for n in ("file", "folder", "pipe", "nowhere", "file/below")]
        + ["mini", "embedded", "grabcut", "dr2seg"]
        + hostile.TEXTS
    )


SEGMENT_OPTIONS = "model adapter recipe segmenter box point attention max-new-tokens method".split()


def words(case: Case) -> list:
    "A command line that somebody may type, or not."
    rng, some = case.rng, names(case)
    kind = rng.choice(
        (
            "train",
            "train",
            "evaluate",
            "rea2seg",
            "ablate",
            "compare",
            "conditioning",
            "runs",
            "check",
            "tables",
            "segment",
            "odd",
        )
    )

    def value():
        return rng.choice(
            (
                lambda: rng.choice(some),
                lambda: repr(rng.choice(hostile.NUMBERS)),
                lambda: repr(rng.choice(hostile.SHAPES)),
                lambda: rng.choice(hostile.RAWS),
            )
        )()

    if kind in ("runs", "check"):
        return [kind, rng.choice(some)]
    if kind == "tables":
        return [kind, *rng.sample(some, 2), "--format", rng.choice(("html", "latex", "x"))]
    if kind == "segment":
        return [
            kind,
            rng.choice(some),
            rng.choice(some),
            "--out",
            rng.choice(some),
            *[f"--{rng.choice(SEGMENT_OPTIONS)}={value()}" for _ in range(rng.choice((1, 2)))],
        ]
    if kind == "odd":
        return [rng.choice(("run", "--resume", "runs", "-h", "", "tables")), *rng.sample(some, 2)]
    notebook = find_experiment(kind)
    declared = sorted({*parameter_defaults(notebook), *old_names_in(notebook)})
    asked = [
        part
        for _ in range(rng.choice((1, 1, 2, 3)))
        for part in ("-p", rng.choice(declared if case.now_and_then(0.95) else some), value())
    ]
    more = [
        ["--out", rng.choice(some)],
        ["--resume"],
        ["--preset", rng.choice(("visionreasoner_7k", "dr2seg_few_shot", *some))],
        [],
    ]
    return [
        "run",
        kind,
        *asked,
        *rng.choice(more),
        *rng.choice((["--out", str(case.root / "out")], [])),
    ]


def typed(case: Case) -> Callable:
    "Command lines."
    line = [
        w.replace("\0", "0")
        .encode("utf-8", "surrogateescape" if case.now_and_then(0.5) else "replace")
        .decode("utf-8", "surrogateescape")
        if isinstance(w, str)
        else w
        for w in (
            x.encode("utf-8", "surrogatepass").decode("utf-8", "replace") for x in words(case)
        )
    ]
    if case.now_and_then(0.1):
        line[-1] += "\udcff"
    case.say(" ".join(w[:60] for w in line)[:300])
    return command(*line)


STATEMENTS = (
    "steps = 3",
    'recipe = "dr2seg"',
    "out = ''",
    "resume = False",
    "a, b = 1, 2",
    "x.y = 1",
    "*a, = [1]",
    "steps += 1",
    "steps: int",
    "steps = range(3)",
    "%matplotlib inline",
    "import os",
    "(",
    "x = " + "[" * 300,
    "x = 1e999",
    "x = __import__('os').system('touch canary')",
    "\ud800 = 1",
    "steps = {[]: 1}",
    "steps = ...",
    "data = 'mini'",
    "x = '''",
)


def notebook(case: Case) -> Callable:
    "A notebook that is run as an experiment."
    rng = case.rng
    source = "\n".join(
        rng.sample(STATEMENTS[:4], 2) + rng.sample(STATEMENTS, rng.choice((0, 1, 2)))
    )
    cell = dict(
        cell_type="code",
        id="a",
        metadata=dict(tags=["parameters"]),
        source=rng.choice((source, source.splitlines(keepends=True))),
        outputs=[],
        execution_count=None,
    )
    tree = dict(
        cells=[cell, cell | dict(id="b", source="1", metadata={})],
        metadata={},
        nbformat=4,
        nbformat_minor=5,
    )
    path = case.input / "odd.ipynb"
    path.write_bytes(case.json(tree, None if case.now_and_then(0.5) else 0))
    if case.now_and_then(0.2):
        case.harm(path)
    case.say(repr(source[:100]))
    return command(
        "run",
        path,
        "-p",
        rng.choice(("steps", "recipe", "x", "out")),
        rng.choice(("3", "x", *hostile.RAWS)),
        "--out",
        case.root / "out",
    )


KINDS = dict(
    reasonseg=4,
    own=4,
    refcoco=4,
    parquet=4,
    picture=4,
    question=2,
    view=5,
    resume=2,
    checkpoint=3,
    served=3,
    typed=5,
    notebook=2,
)


def templates(folder: Path):
    "What the cases start from: a trained run, and a server's good reply."
    config = TrainConfig(
        steps=2,
        prompts=1,
        samples=2,
        max_new_tokens=8,
        eval_samples=2,
        rank=2,
        alpha=2,
        checkpoint_every=1,
        record=1,
        segmenter="grabcut",
    )
    train(config, folder / "run")
    asked, sample = load_policy("embedded"), MiniReasonSeg("val")[0]
    text = METHODS["dr2seg"].prompt(sample.query, eval=True)
    with torch.no_grad():
        seen = asked.encode([sample.image])
        done = asked.generate(asked.prefill([text], seen), 1, 6, temperature=0)
        ids, mask = asked.tokenize([text], seen)
    row, logp = done.ids[0][done.mask[0]].tolist(), done.logp[0][done.mask[0]].tolist()
    choice = dict(
        index=0,
        message=dict(role="assistant", content="x"),
        token_ids=row,
        logprobs=dict(content=[dict(token="x", logprob=p) for p in logp]),
    )
    (folder / "reply.json").write_text(
        json.dumps(
            dict(
                object="chat.completion",
                model="policy",
                choices=[choice],
                prompt_token_ids=ids[0][mask[0].bool()].tolist(),
            )
        )
    )
