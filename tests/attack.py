"""Attack the workbench with inputs that nobody meant: data sets, runs, servers, commands.

    python tests/attack.py --seed 0 --n 2000
    python tests/attack.py --seed 0 --only 137 --keep /tmp/case

Every case must end in a result, or in one sentence with an exit code other than 0. A traceback, a
crash, a hang, too much memory, code that ran, a page that took a value for markup, a fetch that
nobody asked for and a changed input are flaws. A case is a process of its own, forked from one that
has imported the library, with limits on time and memory. Seed and number decide it, so that
`--only` repeats it. `tests/test_attack.py` runs a few.
"""

import os

for name in "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS":
    os.environ[name] = "1"  # a forked process must not wait for threads it has not
os.environ |= dict(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    DR2SEG_WATCHED="1",
    PYTHONWARNINGS="ignore",
)

import argparse
import fnmatch
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import attack_cases as cases
import cv2
import torch
from pydantic import ValidationError
from tqdm import tqdm

from dr2seg_lib.commands.execute import execute_notebook
from dr2seg_lib.commands.parameters import validation_sentence

torch.set_num_threads(1)
cv2.setNumThreads(1)
tqdm.monitor_interval = 0  # no thread of its own
warnings.simplefilter("ignore")

CPU, WALL, IDLE = 20, 90, 15  # seconds of work, in all, without work
MEMORY = 3 * 2**30  # bytes above those at the start
SENTENCE = 1500  # letters at most
CYCLE = [kind for kind, share in cases.KINDS.items() for _ in range(share)]
random.Random(0).shuffle(CYCLE)
ORDER = [*cases.KINDS, *CYCLE]  # every kind among the first


@dataclass
class Verdict:
    "What became of a case."

    number: int
    kind: str
    outcome: str  # result, sentence or flaw
    text: str  # the sentence, or what is wrong
    notes: list  # what was done
    seconds: float  # of work


def kind_of(number: int) -> str:
    return ORDER[number] if number < len(ORDER) else CYCLE[number % len(CYCLE)]


# ---- in the case's process


def bound():
    "Limits on what this process may use."
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    used = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (used + CPU, used + CPU + 2))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, 2**30))


def redirect(root: Path):
    "Output goes into files."
    for number, name in (1, "stdout"), (2, "stderr"):
        fd = os.open(root / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def sentence_text(error: Exception) -> str:
    "An error that a user can mend, on one line."
    if isinstance(error, ValidationError):
        return validation_sentence(error)
    return " ".join(str(error).split())


def replace_everywhere(function, stand_in):
    "Whoever of the library calls a function calls its stand-in, under whatever name."
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "dr2seg_lib":
            continue
        held = [key for key, value in vars(module).items() if value is function]
        for key in held:
            setattr(module, key, stand_in)


def carry_out(does) -> dict:  # outcome, text
    "Does it, and says how it ended."
    try:
        code = does()
        if isinstance(code, int):
            return dict(outcome="command", text=str(code))
        return dict(outcome="result", text="")
    except SystemExit as e:
        return dict(outcome="command", text=str(e.code))
    except cases.Flaw as e:
        return dict(outcome="flaw", text=str(e))
    except MemoryError:
        return dict(outcome="flaw", text="the memory is used up")
    except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as e:
        return judged(e)
    except OSError as e:
        return judged(e) if e.errno is None else traced(e)
    except BaseException as e:
        return traced(e)


def judged(error: Exception) -> dict:
    "An error that is meant for the user, if it reads like one."
    text = sentence_text(error)
    if type(error) in (UnicodeDecodeError, UnicodeEncodeError, json.JSONDecodeError):
        return traced(error)
    good = ";" in text or "." in text.rstrip(".") or isinstance(error, ValidationError)
    if good and len(text) <= SENTENCE:
        return dict(outcome="sentence", text=text)
    problem = f"no sentence for a user: {type(error).__name__}: {text[:300]} {where(error)}"
    return dict(outcome="flaw", text=problem)


def where(error: BaseException) -> str:
    "The last lines of our own on the way to an error."
    at, lines = error.__traceback__, []
    while at:
        file = Path(at.tb_frame.f_code.co_filename)
        if "dr2seg_lib" in file.parts:
            lines.append(f"{file.name}:{at.tb_lineno}")
        at = at.tb_next
    return f"({' > '.join(lines[-3:])})"


def traced(error: BaseException) -> dict:
    text = " ".join(str(error).split())[:300]
    return dict(outcome="flaw", text=f"traceback: {type(error).__name__}: {text} {where(error)}")


def live(number: int, seed: int, root: Path, templates: Path):
    "The case, in the process that was forked for it; it never returns."
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    redirect(root)
    case = cases.Case(root, templates, random.Random(f"{seed} {number}"))
    os.chdir(root)
    try:
        does = getattr(cases, kind_of(number))(case)
        files = snapshot(case.input)
        before = dict(notes=case.notes, may_change=case.may_change, files=files)
        (root / "before.json").write_text(json.dumps(before))
        replace_everywhere(execute_notebook, cases.no_notebook)
        bound()
        outcome = carry_out(does)
    except BaseException as e:
        outcome = traced(e) | dict(outcome="flaw")  # of the attack itself
    sys.stdout.flush(), sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
    (root / "outcome.json").write_text(json.dumps(outcome))
    os._exit(0)


# ---- in the process that judges


def snapshot(folder: Path) -> dict:  # {name: what it is}
    "Every file below a folder, by its content."
    found = {}
    for path in sorted(p for p in folder.rglob("*")):
        name = (
            str(path.relative_to(folder))
            .encode("utf-8", "surrogateescape")
            .decode("utf-8", "replace")
        )
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            with suppress(PermissionError):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def used_ticks(pid: int) -> int | None:  # None: the process is gone
    "The work of a process so far, in the kernel's ticks."
    with suppress(FileNotFoundError, ProcessLookupError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])
    return None


def overtime(began: float, worked: float) -> str | None:  # both in seconds since 1970
    "Why a case has to be ended."
    if time.time() - began > WALL:
        return f"took {WALL} seconds"
    if time.time() - worked > IDLE:
        return f"waited {IDLE} seconds for nothing"
    return None


def wait(
    pid: int,
) -> tuple[str | None, float]:  # why it was ended, None when it ended by itself; seconds of work
    "Waits for a case, and ends one that takes too long."
    began = worked = time.time()
    used = -1
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            killed = os.WIFSIGNALED(status) and signal.Signals(os.WTERMSIG(status)).name
            return f"killed by {killed}" if killed else None, usage.ru_utime + usage.ru_stime
        time.sleep(0.005)
        now = used_ticks(pid)
        if now not in (None, used):
            used, worked = now, time.time()
        if late := overtime(began, worked):
            os.kill(pid, signal.SIGKILL)
            usage = os.wait4(pid, 0)[2]
            return late, usage.ru_utime + usage.ru_stime


def lost(root: Path, before: dict) -> str | None:
    "What of the input, or beside it, is not as it was."
    if (root / "canary").exists():
        return "code of the input ran"
    witness = root / "witness"
    beside = [path.name for path in witness.iterdir()]
    if beside != ["secret.txt"] or (witness / "secret.txt").read_text() != "nobody's business":
        return "a file beside the input was changed"

    def may_change(name):
        return any(fnmatch.fnmatch(Path(name).name, p) for p in before["may_change"])

    now = snapshot(root / "input")
    differs = [name for name, what in before["files"].items() if now.get(name) != what]
    changed = [name for name in differs if not may_change(name)]
    return f"the input was changed: {changed[:5]}" if changed else None


def sentence_of(root: Path, code: str) -> dict:
    "What a command has said, judged by its exit code."
    out, err = ((root / n).read_text(errors="replace") for n in ("stdout", "stderr"))
    lines = [line for line in err.splitlines() if line.startswith("dr2seg: ")]
    if code in ("0", "None"):
        return dict(outcome="result", text="")
    if len(lines) == 1 and len(lines[0]) <= SENTENCE:
        return dict(outcome="sentence", text=lines[0])
    if code == "1" and " broken:" in out or code == "2" and "usage: " in err:
        return dict(outcome="sentence", text=(out or err)[-200:])
    letters = max(map(len, lines), default=0)
    first = (lines or [err[-300:]])[0][:300]
    problem = f"exit code {code} with {len(lines)} sentences of {letters} letters: {first}"
    return dict(outcome="flaw", text=problem)


def verdict(number: int, root: Path, ended: str | None, seconds: float) -> Verdict:
    "How a case ended."

    def read(name):
        return json.loads((root / name).read_text()) if (root / name).is_file() else {}

    outcome, before = read("outcome.json"), read("before.json")
    err = (root / "stderr").read_text(errors="replace") if (root / "stderr").is_file() else ""
    if ended:
        outcome = dict(outcome="flaw", text=ended)
    elif outcome.get("outcome") == "command":
        outcome = sentence_of(root, outcome["text"])
    if (
        not ended
        and outcome.get("outcome") != "flaw"
        and "Traceback (most recent call last)" in err
    ):
        outcome = dict(outcome="flaw", text=f"a traceback on the screen: {err[-300:]}")
    if before and (wrong := lost(root, before)):
        outcome = dict(outcome="flaw", text=wrong)
    return Verdict(
        number,
        kind_of(number),
        outcome.get("outcome", "flaw"),
        outcome.get("text", "it ended without a word"),
        before.get("notes", []),
        seconds,
    )


def attempt(number: int, seed: int, templates: Path, keep: Path | None = None) -> Verdict:
    "One case, from its fork to its verdict."
    root = (
        keep or Path(tempfile.mkdtemp(prefix=f"attack-{number}-")) / "case"
    )  # what a case finds in .. is nothing
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        live(number, seed, root, templates)
    ended, seconds = wait(pid)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it may have started
    found = verdict(number, root, ended, seconds)
    if not keep:
        shutil.rmtree(root.parent, ignore_errors=True)
    return found


def prepare(folder: Path):
    "The templates, made in a process of its own, since what makes them starts threads."
    pid = os.fork()
    if not pid:
        try:
            redirect(folder)
            cases.templates(folder)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError((folder / "stderr").read_text()[-2000:])


def share(
    numbers: list, seed: int, templates: Path, say, keep: Path | None = None
) -> list:  # of Verdict
    found = []
    for number in numbers:
        found.append(attempt(number, seed, templates, keep))
        say(found[-1])
    return found


def campaign(
    seed: int, numbers: list, workers: int = 1, say=lambda verdict: None, keep: Path | None = None
) -> list:  # of Verdict
    "All cases, by one process or several."
    with tempfile.TemporaryDirectory(prefix="attack-templates-") as folder:
        prepare(Path(folder))
        if workers == 1:
            return share(numbers, seed, Path(folder), say, keep)
        pids = []
        for k in range(workers):
            if pid := os.fork():
                pids.append(pid)
                continue
            found = share(numbers[k::workers], seed, Path(folder), say)
            (Path(folder) / f"found-{k}.json").write_text(json.dumps([vars(v) for v in found]))
            os._exit(0)
        for pid in pids:
            os.waitpid(pid, 0)
        found = [
            Verdict(**v)
            for k in range(workers)
            for v in json.loads((Path(folder) / f"found-{k}.json").read_text())
        ]
    return sorted(found, key=lambda v: v.number)


def described(v: Verdict, seed: int) -> str:
    return (
        f"case {v.number} ({v.kind}, {v.seconds:.1f} s): {v.text}\n"
        f"    what was done: {'; '.join(v.notes)[:600]}\n"
        f"    again by: python tests/attack.py --seed {seed} --only {v.number}"
    )


def summary(found: list) -> str:
    "Outcomes by kind."
    lines = [f"{'kind':12}{'cases':>7}{'results':>9}{'sentences':>11}{'flaws':>7}{'seconds':>9}"]
    for kind in [*cases.KINDS, "all"]:
        some = [v for v in found if kind in (v.kind, "all")]
        count = Counter(v.outcome for v in some)
        counts = f"{len(some):7}{count['result']:9}{count['sentence']:11}{count['flaw']:7}"
        lines.append(f"{kind:12}{counts}{sum(v.seconds for v in some):9.1f}")
    return "\n".join(lines)


def main() -> int:  # exit code, 1 when there is a flaw
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--n", type=int, default=2000, help="so many cases")
    p.add_argument("--only", type=int, help="one case, by its number")
    p.add_argument("--kind", choices=cases.KINDS, help="cases of one kind alone")
    p.add_argument("--all", action="store_true", help="tell every case, not the flaws alone")
    p.add_argument("--workers", type=int, default=1, help="processes that share the cases")
    p.add_argument("--keep", type=Path, help="leave the case's folder here, with --only")
    args = p.parse_args()
    numbers = (
        [k for k in range(args.n) if not args.kind or kind_of(k) == args.kind]
        if args.only is None
        else [args.only]
    )

    def say(v):
        if v.outcome == "flaw" or args.all or args.only is not None:
            print(f"{v.outcome}: {described(v, args.seed)}", flush=True)

    found = campaign(args.seed, numbers, args.workers, say, args.keep and args.keep.absolute())
    print(summary(found))
    return int(any(v.outcome == "flaw" for v in found))


if __name__ == "__main__":
    sys.exit(main())
