"""Cut the power at every moment of a run, and see that nothing is lost that was said to be safe.

    python tests/powercut.py                 # every state is looked at, and every state is resumed
    python tests/powercut.py --resumed 3     # three of them are resumed

A file that was written is safe once it was synced, and its name once its folder was. So each
`fsync` of a run is noted with what it made safe. After each one, two disks are imagined as a
power cut might leave them: `dropped`, on which whatever was not synced never happened; and
`names`, on which all names are there, but files hold what was synced (an empty file where nothing
was), as after a rename that overtook its data. `--forget-folders` leaves out the syncs of
folders, and has to fail: that is the test of this test.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import stat
import sys
import tempfile
from pathlib import Path

import kills

from dr2seg_lib.runs.checkpoints import latest_checkpoint, step_of
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.status import read_record
from dr2seg_lib.training import trainer
from dr2seg_lib.training.config import TrainConfig

CONFIG = TrainConfig(**kills.SMALL | dict(steps=3), eval_samples=2, segmenter="grabcut")
FAMILIES = "dropped", "names"


class Disk:
    "What of a folder is safe, from the syncs that were made."

    def __init__(self, root: Path, store: Path, forget_folders: bool):
        self.root, self.store, self.forget_folders = root, store, forget_folders
        self.files, self.folders, self.held, self.states = {}, {}, {}, []
        self.promised = dict(
            created=False, rows=0, checkpoint=0
        )  # what the code has been told is safe
        self.sync_now, os.fsync = os.fsync, self.fsync
        self.note_folder(root)

    def fsync(self, fd: int):
        self.sync_now(fd)
        path, info = Path(os.readlink(f"/proc/self/fd/{fd}")), os.fstat(fd)
        if self.root not in (path, *path.parents):
            return
        self.held.setdefault(info.st_ino, os.dup(fd))  # so that no other file gets its number
        if not stat.S_ISDIR(info.st_mode):
            self.files[info.st_ino] = self.keep(path.read_bytes())
        elif not self.forget_folders:
            self.note_folder(path)
        for family in FAMILIES:
            self.states.append(
                (family, dict(self.promised), getattr(self, family)(self.root, Path()))
            )

    def keep(self, data: bytes) -> str:  # its name in the store
        name = hashlib.sha256(data).hexdigest()
        if not (self.store / name).exists():
            (self.store / name).write_bytes(data)
        return name

    def note_folder(self, path: Path):
        entries = [(e.name, e.inode(), e.is_dir(follow_symlinks=False)) for e in os.scandir(path)]
        self.folders[path.stat().st_ino] = entries

    def dropped(
        self, folder: Path, at: Path, number: int | None = None
    ) -> dict:  # {path: name in the store, None a folder}
        found = {}
        for name, inode, is_folder in self.folders.get(number or folder.stat().st_ino, []):
            found[str(at / name)] = None if is_folder else self.files.get(inode, self.keep(b""))
            found |= self.dropped(folder, at / name, inode) if is_folder else {}
        return found

    def names(self, folder: Path, at: Path) -> dict:
        found = {}
        for e in sorted(os.scandir(folder), key=lambda e: e.name):
            is_folder = e.is_dir(follow_symlinks=False)
            found[str(at / e.name)] = (
                None if is_folder else self.files.get(e.inode(), self.keep(b""))
            )
            found |= self.names(Path(e.path), at / e.name) if is_folder else {}
        return found


def record(folder: Path, store: Path, forget_folders: bool):
    "A training whose every sync is noted; the states go to `store/states.json`."
    disk = Disk(folder.parent, store, forget_folders)
    log, save, create = Run.log, trainer.save_checkpoint, Run.create

    def log_and_promise(run, row):
        log(run, row)
        disk.promised["rows"] = row["step"]

    def save_and_promise(folder, step, *args, **kwargs):
        path = save(folder, step, *args, **kwargs)
        disk.promised["checkpoint"] = step
        return path

    def create_and_promise(*args, **kwargs):
        run = create(*args, **kwargs)
        disk.promised["created"] = True
        return run

    Run.log, Run.create = log_and_promise, create_and_promise
    trainer.save_checkpoint = save_and_promise
    trainer.train(CONFIG, folder)
    (store / "states.json").write_text(json.dumps(disk.states))


def build(state: dict, store: Path, at: Path):
    "A disk as it was imagined."
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True)
    for path, name in state.items():
        if name is None:
            (at / path).mkdir(exist_ok=True)
        else:
            shutil.copyfile(store / name, at / path)


def whole_rows(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def look(folder: Path, promised: dict) -> str | None:  # what is lost, in words
    "Whether all that was promised is there."
    if not promised["created"]:
        return None
    try:
        read_record(folder)
    except (OSError, ValueError) as e:
        return f"run.json is lost ({e})"
    if whole_rows(folder / "metrics.jsonl") < promised["rows"]:
        return f"rows of metrics.jsonl are lost: {promised['rows']} were logged"
    newest = latest_checkpoint(folder)
    if promised["checkpoint"] and (newest is None or step_of(newest) < promised["checkpoint"]):
        return f"checkpoint {promised['checkpoint']} is lost, {newest} is left"
    return None


def resume(folder: Path, want: dict):
    if not (folder / "run.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # nothing was begun
    kills.finish(lambda f: trainer.train(CONFIG, f, resume=(f / "run.json").exists()), folder)
    kills.compare(folder, want)


def trial(
    root: Path, resumed: int | None, forget_folders: bool, seed: int = 0
) -> dict:  # resumed: how many states; None: all
    store, disk, again = root / "store", root / "disk", root / "again"
    store.mkdir()
    disk.mkdir()
    kills.finish(lambda folder: record(folder, store, forget_folders), disk / "run")
    want, states = kills.left(disk / "run"), json.loads((store / "states.json").read_text())
    for number, (family, promised, state) in enumerate(states):
        build(state, store, again)
        lost = look(again / "run", promised)
        assert lost is None, f"state {number} ({family}): {lost}"
    begun = [(n, s) for n, (_, promised, s) in enumerate(states) if promised["created"]]
    chosen = begun if resumed is None else random.Random(seed).sample(begun, resumed)
    for number, state in chosen:
        build(state, store, again)
        resume(again / "run", want)
        print(f"state {number}: resumed, equal to the unbroken run", flush=True)
    return dict(states=len(states), resumed=len(chosen))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resumed", type=int)
    parser.add_argument("--forget-folders", action="store_true")
    args = parser.parse_args()
    sys.stderr.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(trial(Path(root).resolve(), args.resumed, args.forget_folders)))


if __name__ == "__main__":
    main()
