"A training tells its trackers: what their own readers find, and what becomes of one that fails."

import json
import os
import struct
import warnings
from collections import defaultdict
from importlib.util import find_spec

import numpy as np
import pytest

from dr2seg_lib.core.files import read_json, write_json
from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.experiments.sweeps import run_sweep
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.runs.trackers import flat_numbers, read_identities
from dr2seg_lib.training import trainer
from dr2seg_lib.training.trainer import train

pytest.importorskip("tensorboard")
wandb = pytest.importorskip("wandb")
SMALL = {
    "rollout.questions_per_step": 2,
    "rollout.group_size": 3,
    "rollout.max_new_tokens": 60,
    "lora.rank": 4,
    "evaluation.samples": 2,
    "evaluation.every": 0,
    "runtime.checkpoint_every": 1,
}
TOLD = SMALL | {"trackers": ["tensorboard", "wandb"], "trackers.pictures_every": 2}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


def board(folder):
    "What TensorBoard would show of a run."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance=dict(images=0)).Reload()


def log_records(data):
    "The records of a file in LevelDB's log format: blocks of 32 KiB, a record in pieces."
    at, whole = 7, b""  # after W&B's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # in one piece, or the last
            yield whole
            whole = b""


def wandb_records(folder):
    "The records of W&B's offline files, as its own code reads them: {kind: records}."
    from wandb.proto.wandb_internal_pb2 import Record

    records = defaultdict(list)
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in log_records(path.read_bytes()):
            record = Record.FromString(data)
            records[record.WhichOneof("record_type")].append(record)
    return records


def wandb_rows(folder):
    "The rows that W&B was told."
    rows = []
    for record in wandb_records(folder)["history"]:
        items = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        rows.append({name: json.loads(value) for name, value in items.items()})
    return rows


def timeless(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "A training that was stopped after its second step and gone on with."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        folder = tmp_path_factory.mktemp("told") / "run"
        take = trainer.take_step

        def interrupted(run, state, data, config, step):
            if step == 2:
                run.stop_wanted = True
            return take(run, state, data, config, step)

        patch.setattr(trainer, "take_step", interrupted)
        train(TrainConfig(steps=3, **TOLD), folder)
        patch.undo()
        patch.setenv("WANDB_MODE", "offline")
        return train(TrainConfig(steps=3, **TOLD), folder, resume=True)


def test_tensorboard_has_every_row_once(told):
    events, rows = board(told.folder), told.metrics()
    flat = [(row["step"], flat_numbers(row)) for row in rows]
    assert len(rows) == 3 and {"reward", "terms/accuracy", "seconds/total"} <= flat[0][1].keys()
    for name in {name for _, numbers in flat for name in numbers} - {"step"}:
        wanted = [(step, numbers[name]) for step, numbers in flat if name in numbers]
        values = [(e.step, e.value) for e in events.Scalars(name)]
        assert values == [(step, pytest.approx(v, rel=1e-6)) for step, v in wanted], name
    results = read_json(told.folder / "results.json")
    (after,) = events.Scalars("results/after/gIoU")
    assert after.step == 3 and after.value == pytest.approx(results["after"]["gIoU"])


def test_tensorboard_shows_the_rollouts(told):
    import cv2

    images = board(told.folder).Images("rollouts")
    assert [e.step for e in images] == [1, 2, 3]
    pixels = cv2.imdecode(np.frombuffer(images[0].encoded_image_string, np.uint8), 1)
    assert pixels.shape == (396, 1100, 3) and pixels.std() > 20


def test_wandb_has_the_same_run_before_and_after_the_stop(told):
    runs = [record.run for record in wandb_records(told.folder)["run"]]
    identity = read_identities(told.folder)["wandb"]
    assert len(list(told.folder.glob("wandb/offline-run-*"))) == 2
    assert {run.run_id for run in runs} == {identity}
    rows, logged = wandb_rows(told.folder), told.metrics()
    rewards = {row["_step"]: row["reward"] for row in rows if "reward" in row}
    assert rewards == {row["step"]: row["reward"] for row in logged}
    pictured = [row["_step"] for row in rows if any("rollouts" in name for name in row)]
    assert pictured == [1, 2, 3]
    assert any(row.get("results/after/gIoU") is not None for row in rows)


def test_wandb_is_told_the_parameters_and_nothing_of_the_machine(told):
    records = wandb_records(told.folder)
    config = {u.key or "/".join(u.nested_key) for r in records["config"] for u in r.config.update}
    config |= {u.key for r in records["run"] for u in r.run.config.update}
    assert {"steps", "lora.rank", "method"} <= config
    names = {p.name for p in told.folder.rglob("wandb/offline-run-*/files/*")}
    assert not names & {"requirements.txt", "wandb-metadata.json", "output.log", "code"}


def test_being_told_changes_no_number(told, tmp_path):
    alone = train(TrainConfig(steps=3, **SMALL), tmp_path / "alone")
    assert [timeless(r) for r in alone.metrics()] == [timeless(r) for r in told.metrics()]
    assert alone.rollouts() == told.rollouts()
    assert not (alone.folder / "tensorboard").exists()


def test_one_named_at_the_resume_hears_what_was_before(told, tmp_path):
    asked = SMALL | {"evaluation.samples": 0}
    train(TrainConfig(steps=1, **asked), tmp_path / "run")
    run = train(TrainConfig(steps=2, trackers="tensorboard", **asked), tmp_path / "run", True)
    assert [e.step for e in board(run.folder).Scalars("reward")] == [1, 2]


@pytest.fixture
def unloaded(monkeypatch):
    "Weights that must not be loaded."

    def load(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(trainer, "load_policy", load)


def test_one_that_is_not_installed_is_named_before_weights_are_loaded(
    unloaded, monkeypatch, tmp_path
):
    real = find_spec
    monkeypatch.setattr(
        "dr2seg_lib.runs.trackers.find_spec", lambda n: None if n == "mlflow" else real(n)
    )
    with pytest.raises(ValueError, match="^trackers: mlflow is not installed; install it with"):
        train(TrainConfig(trackers="tensorboard,mlflow", **SMALL), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_wandb_without_a_login_is_a_sentence_before_weights_are_loaded(
    unloaded, monkeypatch, tmp_path
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb.teardown()  # it reads its settings once
    with pytest.raises(ValueError, match="trackers: wandb cannot be started .*; mend that") as e:
        train(TrainConfig(trackers="wandb", **SMALL), tmp_path / "run")
    assert "\n" not in str(e.value)
    wandb.teardown()


def test_one_that_fails_on_the_way_is_dropped(monkeypatch, tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    add = SummaryWriter.add_scalar

    def full(self, name, value, global_step, **kwargs):
        if global_step == 2:
            raise OSError(28, "No space left on device")
        return add(self, name, value, global_step, **kwargs)

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config = TrainConfig(steps=2, trackers="tensorboard,wandb", **SMALL)
        run = train(config, tmp_path / "run")
    assert run.status == "done" and len(run.metrics()) == 2
    words = [str(w.message) for w in said if "is told no more" in str(w.message)]
    assert len(words) == 1 and words[0].startswith("tensorboard is told no more (OSError")
    assert 2 in [row["_step"] for row in wandb_rows(run.folder)]


def test_the_runs_of_a_sweep_are_a_group(tmp_path):
    asked = SMALL | {"trackers": "wandb", "evaluation.samples": 0}
    with Run.create(tmp_path / "sweep", {}, bar=False) as run:
        assert run_sweep(run, {"dpad-s1": TrainConfig(steps=1, **asked)}, 1) == {}
    arm = tmp_path / "sweep" / "dpad-s1"
    (record,) = wandb_records(arm)["run"]
    assert (record.run.run_group, record.run.display_name) == ("sweep", "dpad-s1")


def test_a_hostile_note_is_a_sentence(unloaded, tmp_path):
    folder = tmp_path / "run"
    asked = {"trackers": "tensorboard", "evaluation.samples": 0}
    with pytest.raises(AssertionError):
        train(TrainConfig(**SMALL | asked), folder)
    write_json(folder / "trackers.json", {"tensorboard": {"id": ["../.."]}})
    with pytest.raises(ValueError, match="trackers.json does not say how"):
        train(TrainConfig(**SMALL | asked), folder, resume=True)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_goes_on_in_the_same_run(monkeypatch, tmp_path):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    asked = SMALL | {"trackers": "mlflow", "evaluation.samples": 0}
    train(TrainConfig(steps=1, **asked), tmp_path / "run")
    run = train(TrainConfig(steps=2, **asked), tmp_path / "run", resume=True)
    client = mlflow.MlflowClient(f"sqlite:///{run.folder}/mlflow.db")
    identity = read_identities(run.folder)["mlflow"]
    (found,) = client.search_runs([client.get_experiment_by_name("dr2seg").experiment_id])
    assert found.info.run_id == identity and found.data.params["lora.rank"] == "4"
    told = {m.step: m.value for m in client.get_metric_history(identity, "reward")}
    assert told == {row["step"]: row["reward"] for row in run.metrics()}
    assert client.list_artifacts(identity, "images")


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_hears_a_training(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACKIO_DIR", os.environ.get("TRACKIO_DIR", str(tmp_path / "trackio")))
    from trackio.sqlite_storage import SQLiteStorage

    asked = {"trackers": "trackio", "trackers.project": tmp_path.name, "evaluation.samples": 0}
    run = train(TrainConfig(steps=2, **SMALL | asked), tmp_path / "run")
    rows = [r for r in SQLiteStorage.get_logs(tmp_path.name, "run") if "reward" in r]
    assert [r["reward"] for r in rows] == [r["reward"] for r in run.metrics()]
