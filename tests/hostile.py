"""What a file, a text or a number may be that nobody meant: values, and changes to whole files.

Everything is drawn from a `random.Random`, so that an attack can be repeated from its seed.
"""

import json
import os
import pickle
import shutil
import struct
from copy import deepcopy
from pathlib import Path
from random import Random

MARK = "<canary-tag onload=alert(1)>"  # on a page, this must be text
RAW = "@@raw@@"  # in a JSON text, where something comes that Python's own writer would refuse

TEXTS = [
    "",
    " ",
    "\n",
    "\0",
    "a\x1b[31m\x07",
    "\u202egnp.exe",
    "\ud800",
    "é" * 300,
    "x" * 5000,
    "w " * 5000,
    MARK,
    "<|image_pad|>",
    "<|im_end|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|image_pad|>" * 50,
    "<think>",
    "</think><answer>[]</answer>",
    "</think>" * 400,
    '<answer>[{"bbox_2d": [1e308, NaN, 1, 1], "point_2d": [0, 0]}]</answer>',
    "../../witness/secret.txt",
    "/etc/passwd",
    "~/x",
    "C:\\x",
    "file:///etc/passwd",
    "a/b/c",
    ".",
    "..",
    "con.py:r",
    "canary.py:r",
    "nobody/nothing",
    "http://127.0.0.1:9",
    "{0.__class__}",
    "%s%n%d",
    "$(touch canary)",
    "'; import os; os.system('touch canary') #",
    "NaN",
    "1e999",
    "-0",
    "true",
    "null",
    "|",
    "`",
    "\\",
    "</script>",
    '"',
    "2026-13-99T99:99:99",
    "#" * 80,
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    -(2**31),
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**300,
    0.5,
    -0.0,
    1e308,
    1e-320,
    1e16,
    32766,
    -32766,
    True,
    False,
]
SHAPES = [
    None,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    [{}],
    [[[[]]]],
    [0] * 3000,
    {"a": {"a": {"a": 1}}},
    ["x"] * 50,
]
RAWS = [
    "[" * 50_000 + "]" * 50_000,
    "[" * 3000,
    '{"a":' * 20_000 + "1" + "}" * 20_000,
    "1e999",
    "-1e999",
    "NaN",
    "-Infinity",
    "9" * 5000,
    "0." + "1" * 100_000,
    '"\\ud800"',
    '"\\u0000"',
    "tru",
    "'x'",
    "1 2",
    '{"a":1,"a":2}',
    "\x00",
    "/*x*/1",
]


def text(rng: Random) -> str:
    "A hostile text, or several in a row."
    return "".join(rng.choice(TEXTS) for _ in range(rng.choice((1, 1, 1, 2, 4))))


def value(rng: Random):
    "Anything that JSON can say, and what it cannot, by `RAW`."
    return rng.choice(
        (
            lambda: text(rng),
            lambda: rng.choice(NUMBERS),
            lambda: deepcopy(rng.choice(SHAPES)),
            lambda: RAW,
        )
    )()


# ---- JSON


def places(tree, path: tuple = ()) -> list:  # of paths
    "Where the values of a JSON tree are."
    inner = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    found = [path] if path else []
    for key, child in inner:
        found += places(child, (*path, key))
    return found


def _holder(tree, path: tuple):
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _replace(rng, holder, key):
    holder[key] = value(rng)


def _delete(rng, holder, key):
    del holder[key]


def _wrap(rng, holder, key):
    holder[key] = [holder[key]]


def _stringify(rng, holder, key):
    holder[key] = str(holder[key])


def _repeat(rng, holder, key):
    holder[key] = [deepcopy(holder[key]) for _ in range(rng.choice((2, 1000)))]


def _nudge(rng, holder, key):
    old = holder[key]
    if isinstance(old, str):
        holder[key] = old[: len(old) // 2] + text(rng) + old[len(old) // 2 :]
    elif isinstance(old, (int, float)):
        holder[key] = rng.choice((-old, old * 10**6, old + 0.5, old + 1, 10**9, -1))
    else:
        holder[key] = deepcopy(rng.choice(SHAPES))


def _add(rng, holder, key):
    if isinstance(holder, dict):
        holder[text(rng)] = value(rng)
    else:
        holder.insert(rng.randrange(len(holder) + 1), value(rng))


CHANGES = _replace, _replace, _nudge, _nudge, _delete, _wrap, _stringify, _repeat, _add


def json_bytes(rng: Random, tree, say, times: int | None = None) -> bytes:
    "A JSON text of a tree after some changes."
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice((1, 1, 2, 3)) if times is None else times):
        if not (found := places(tree)):
            break
        path, change = rng.choice(found), rng.choice(CHANGES)
        change(rng, _holder(tree, path), path[-1])
        say(f"{change.__name__.strip('_')} at {path}")
    written = json.dumps(tree)
    while f'"{RAW}"' in written:
        raw = rng.choice(RAWS)
        written = written.replace(f'"{RAW}"', raw, 1)
        say(f"raw {raw[:20]!r}")
    return written.replace(RAW, "raw").encode()


# ---- bytes and files


def spoil(rng: Random, data: bytes, say) -> bytes:
    "Some bytes of a file after a few accidents."
    kind = rng.choice(
        (
            "flip",
            "flip",
            "flip",
            "cut",
            "cut",
            "insert",
            "double",
            "zero",
            "empty",
            "utf16",
            "bom",
            "noise",
        )
    )
    say(f"{kind} of {len(data)} bytes")
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2)) if data else (0, 0)
    if kind == "flip":
        data = bytearray(data)
        for _ in range(rng.choice((1, 3, 20)) if data else 0):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + rng.randbytes(rng.choice((1, 8, 400))) + data[at:]
    if kind == "double":
        return data[:end] + data[at:]
    if kind == "zero":
        return data[:at] + bytes(end - at) + data[end:]
    if kind == "utf16":
        return data.decode("latin1").encode("utf-16")
    return dict(empty=b"", bom=b"\xef\xbb\xbf" + data, noise=rng.randbytes(len(data)))[kind]


def misplace(rng: Random, path: Path, witness: Path, say):
    "Something else where a file should be."
    kind = rng.choice(
        ("missing", "folder", "dangling", "loop", "outside", "pipe", "empty", "forbidden", "device")
    )
    say(f"{kind} in place of {path.name}")
    if kind == "forbidden":
        return path.chmod(0)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "outside":
        path.symlink_to(witness)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "device":
        path.symlink_to("/dev/zero")


def harm(rng: Random, path: Path, witness: Path, say):
    "One file, spoiled or misplaced."
    if rng.random() < 0.25:
        return misplace(rng, path, witness, say)
    say(f"in {path.name}:")
    path.write_bytes(spoil(rng, path.read_bytes(), say))


# ---- pickles


def pickles(canary: Path) -> dict:  # {name: bytes}
    "Pickles that would run something, or be larger than they look."

    class Touch:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    laughs = (
        b"\x80\x02]q\x00"
        + b"".join(
            b"](h" + bytes([k]) + b"h" + bytes([k]) + b"eq" + bytes([k + 1]) for k in range(60)
        )
        + b"."
    )
    length = chr(len(str(canary)) + 6)
    by_name = f"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c{length}touch {canary}\x85R."
    return {
        "a call": pickle.dumps(Touch(), 2),
        "a call, old": f"cos\nsystem\n(S'touch {canary}'\ntR.".encode(),
        "a call by name": by_name.encode("latin1"),
        "builtins": f'cbuiltins\neval\n(S\'open("{canary}", "w")\'\ntR.'.encode(),
        "a huge memo": b"\x80\x02]r\xff\xff\xff\x7f.",
        "a huge text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "a huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b".",
        "deep": b"\x80\x02" + b"(" * 200_000 + b"l" * 1000 + b".",
        "laughs": laughs,
        "nothing on the stack": b"\x80\x02.",
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "not a list": pickle.dumps({"a": 1}, 0),
    }


# ---- geometry


def polygon(rng: Random) -> list:  # [[x, y], …]
    "A polygon that is drawn slowly, or not at all."
    n = rng.choice((0, 2, 3, 300, 3000, 20_000, 200_000))
    reach = rng.choice((30, 32766, 32766, 10**6, 1e300))
    kind = rng.choice(("zigzag", "zigzag", "random", "same", "odd"))
    if kind == "zigzag":
        return [[reach if k % 2 else -reach, k % 20] for k in range(n)]
    if kind == "random":
        return [[rng.uniform(-reach, reach), rng.uniform(-reach, reach)] for _ in range(n)]
    return [[5, 5]] * n if kind == "same" else [[1, 2, 3], ["a", None], [RAW, 1], [5]]


def run_lengths(rng: Random, w: int, h: int) -> dict:
    "Run lengths of a mask that lie."
    size = rng.choice(
        ([h, w], [w, h], [2**31, 2**31], [0, 0], [-h, w], None, [h], [h, w, 3], [10**5, 10**5])
    )
    counts = rng.choice(
        (
            [w * h],
            [0, w * h],
            [10**12],
            [-1, w * h + 1],
            [0.5],
            [],
            [0] * 10**5,
            "0" * 1000,
            "~~~~",
            "PPYo0",
            "\ud800",
            None,
            [RAW],
            7,
        )
    )
    return dict(size=size, counts=counts)
