"The loop: same seed, same metrics; stop and resume; what a run leaves behind."

import dataclasses
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

import dr2seg_lib
from dr2seg_lib.commands.parameters_cell import parameters_of
from dr2seg_lib.core.files import read_json, read_jsonl, write_json
from dr2seg_lib.core.masks import encode_rle
from dr2seg_lib.data.datasets import load_data
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.data.records import BrokenRecord
from dr2seg_lib.methods.registry import METHODS, register_method
from dr2seg_lib.methods.visionreasoner import visionreasoner
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.runs.checkpoints import (
    file_sha256,
    latest_checkpoint,
    list_checkpoints,
    read_manifest,
    save_checkpoint,
    verify_checkpoint,
)
from dr2seg_lib.runs.housekeeping import change_tags, read_tags, rename_run
from dr2seg_lib.runs.run_folder import Run, new_folder
from dr2seg_lib.runs.status import read_record, run_status, update_record
from dr2seg_lib.training.batches import sample_batch
from dr2seg_lib.training.checkpoint_state import load_state, save_state, whole_state
from dr2seg_lib.training.config import TrainConfig, check_training, load_preset
from dr2seg_lib.training.trainer import build_training_state, train, train_step

SMALL = dict(
    steps=2,
    prompts=2,
    samples=3,
    rank=4,
    alpha=4,
    eval_samples=0,
    max_new_tokens=60,
    checkpoint_every=1,
)
# AdamW's first steps divide a gradient by itself: one as small as its 1e-8 would turn any rounding
# into a step of its own. Clipped to a small norm, such gradients stay where they are.
TOGETHER = SMALL | dict(prompts=4, eval_samples=5, record=4, grad_norm=1e-3)


def timeless(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(TrainConfig(**SMALL), tmp_path_factory.mktemp("whole") / "run")


def test_same_seed_same_metrics(whole, tmp_path):
    again = train(TrainConfig(**SMALL), tmp_path / "again")
    assert [timeless(r) for r in again.metrics()] == [timeless(r) for r in whole.metrics()]
    assert again.rollouts() == whole.rollouts()
    other = train(TrainConfig(**SMALL | dict(seed=1, steps=1)), tmp_path / "other")
    assert timeless(other.metrics()[0]) != timeless(whole.metrics()[0])


def test_rows_and_records_hold_what_the_contract_says(whole):
    row, record = whole.metrics()[-1], whole.rollouts()[0]
    assert set(row) >= {
        "step",
        "reward",
        "terms",
        "accuracy",
        "tokens",
        "tokens_second",
        "answer_entropy",
        "kl",
        "loss",
        "lr",
        "grad_norm",
        "seconds",
        "tokens_per_second",
    }
    assert set(row["seconds"]) == {"first", "second", "reward", "reference", "update", "total"}
    assert set(row["terms"]) == {
        "thinking_format",
        "answer_format",
        "non_repeat",
        "accuracy",
        "description",
        "length",
    }
    assert "".join(record["first"]["tokens"]) == record["first"]["text"]
    assert len(record["first"]["entropy"]) == len(record["first"]["tokens"])
    t = record["terms"]
    assert record["reward"] == pytest.approx(
        (
            t["thinking_format"]
            + t["answer_format"]
            + t["non_repeat"]
            + t["accuracy"]
            + t["description"]
        )
        * t["length"]
    )
    assert len(whole.rollouts()) == 2 * 2 * 3
    assert whole.info["frame"] == 112


@pytest.mark.parametrize(
    "settings", [{}, dict(updates=2), dict(tune="full", lr=1e-4), dict(norm_lr=1e-2)], ids=str
)
def test_resume_is_bit_exact(settings, tmp_path):
    config = TrainConfig(**SMALL | settings)
    unbroken = train(config, tmp_path / "unbroken")
    with Run.create(tmp_path / "broken", config.model_dump(), bar=False):
        pass
    state = build_training_state(config)
    samples, _ = sample_batch(load_data("mini", "train"), config, 1)
    row, _ = train_step(state, samples, config, 1)
    save_checkpoint(
        tmp_path / "broken",
        1,
        lambda d: save_state(state.policy, whole_state(state.policy, state.optimizer), d),
    )
    resumed = train(config, tmp_path / "broken", resume=True)
    assert timeless(row) == timeless(unbroken.metrics()[0])
    assert timeless(resumed.metrics()[0]) == timeless(unbroken.metrics()[1])
    for path in latest_checkpoint(unbroken.folder).glob("*.safetensors"):
        a, b = load_file(str(path)), load_file(str(latest_checkpoint(resumed.folder) / path.name))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_chunks_change_memory_only(tmp_path):
    rows = [
        timeless(
            train(
                TrainConfig(**SMALL | dict(steps=1, kl=0.1), runtime=dict(max_tokens=c)),
                tmp_path / str(c),
            ).metrics()[0]
        )
        for c in (160, 4096)  # some answers of a group, all groups
    ]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(TrainConfig(**TOGETHER), tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize(
    "memory", [dict(), dict(shard=True, checkpointing=True)], ids=["whole", "sharded"]
)
def test_two_processes_give_the_metrics_of_one(tmp_path, alone, memory):
    one, two = alone, train(TrainConfig(**TOGETHER | memory | dict(processes=2)), tmp_path / "two")

    def numbers(row):
        return {
            k: v for k, v in row.items() if isinstance(v, float) and k != "tokens_per_second"
        } | row["terms"]

    assert [numbers(r) for r in two.metrics()] == [
        pytest.approx(numbers(r), abs=1e-5) for r in one.metrics()
    ]

    def said(run):
        return [
            (
                r["step"],
                r["sample"],
                r["rollout"],
                r["first"]["text"],
                r["second"] and r["second"]["text"],
            )
            for r in run.rollouts()
        ]

    assert said(two) == said(one)
    assert len(said(one)) == 2 * 4 * 3
    for when in ("before", "after"):
        a, b = (read_json(run.folder / "results.json")[when] for run in (one, two))
        assert a["n"] == b["n"] == 5
        assert a["gIoU"] == pytest.approx(b["gIoU"], abs=1e-5)
    a, b = (
        load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors"))
        for run in (one, two)
    )
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_weights_that_bfloat16_would_round_away_are_kept_in_float32_or_refused():
    for given, mend in (
        (dict(tune="full"), "runtime.shard true"),
        (dict(norm_lr=0.02), "optim.norm_lr 0"),
    ):
        with pytest.raises(ValidationError, match=f"lose the small steps.*use {mend}"):
            TrainConfig(dtype="bfloat16", **given)
    TrainConfig(dtype="bfloat16", tune="full", shard=True)


def test_questions_must_be_shared_evenly():
    with pytest.raises(
        ValidationError,
        match="questions_per_step: 16 questions cannot be shared by 3 processes",
    ):
        TrainConfig(processes=3)


ON_THE_WAY = SMALL | {
    "steps": 5,
    "evaluation.samples": 6,
    "evaluation.every": 2,
    "evaluation.every_samples": 4,
    "data.balance": "kind",
}


def test_held_out_questions_on_the_way_and_their_best_checkpoint(tmp_path, monkeypatch):
    "Stopped after step 3 and gone on with, a run says and keeps what an unbroken one does."
    config = TrainConfig(**ON_THE_WAY)
    unbroken = train(config, tmp_path / "unbroken")
    log = Run.log

    def stop_at_three(run, row):
        log(run, row)
        if row["step"] == 3:
            (run.folder / "stop").touch()

    monkeypatch.setattr(Run, "log", stop_at_three)
    assert train(config, tmp_path / "broken").status == "interrupted"
    monkeypatch.undo()
    resumed = train(config, tmp_path / "broken", resume=True)
    rows = unbroken.metrics()
    assert [timeless(r) for r in resumed.metrics()] == [timeless(r) for r in rows]
    assert [r["step"] for r in rows if "held_out" in r] == [2, 4, 5]
    assert [r["step"] for r in rows if "held_out_start" in r] == [1]
    points = {r["step"]: r["held_out"]["greedy"]["gIoU"] for r in rows if "held_out" in r}
    kept = read_jsonl(unbroken.folder / "held_out.jsonl")
    assert read_jsonl(resumed.folder / "held_out.jsonl") == kept, "a resume keeps the same answers"
    assert [r["step"] for r in kept] == [step for step in (0, 2, 4, 5) for _ in range(4)]
    for run in unbroken, resumed:
        best = read_json(run.folder / "results.json")["best"]
        assert points[best["step"]] == max(points.values())
        assert (run.folder / best["checkpoint"] / "manifest.json").is_file()


def files_of(folder):
    "What a run leaves, apart from its times, its process and its name."
    names = "rollouts", "held_out", "predictions_before", "predictions_after"
    return {name: (folder / f"{name}.jsonl").read_bytes() for name in names}


def test_a_renamed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch):
    "Ended between two checkpoints, tagged, renamed, gone on with: bit for bit the unbroken one."
    config = TrainConfig(**ON_THE_WAY)
    unbroken = train(config, tmp_path / "unbroken")
    log = Run.log

    def die_at_four(run, row):
        if row["step"] == 4:  # after its held-out answers, before its row
            raise KeyboardInterrupt
        log(run, row)

    monkeypatch.setattr(Run, "log", die_at_four)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken")
    monkeypatch.undo()
    assert {r["step"] for r in read_jsonl(tmp_path / "broken" / "held_out.jsonl")} == {0, 2, 4}
    change_tags(tmp_path / "broken", ["good"])
    renamed = rename_run(tmp_path / "broken", "renamed")
    resumed = train(config, renamed, resume=True)
    assert [timeless(r) for r in resumed.metrics()] == [timeless(r) for r in unbroken.metrics()]
    assert files_of(renamed) == files_of(unbroken.folder)
    for path in latest_checkpoint(unbroken.folder).glob("*.safetensors"):
        a, b = load_file(str(path)), load_file(str(latest_checkpoint(renamed) / path.name))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert read_tags(renamed) == ["good"]


def test_what_is_asked_on_the_way_changes_no_training(tmp_path):
    plain = train(TrainConfig(**ON_THE_WAY | {"steps": 2, "evaluation.every": 0}), tmp_path / "a")
    asked = train(TrainConfig(**ON_THE_WAY | {"steps": 2, "evaluation.every": 1}), tmp_path / "b")
    for a, b in zip(plain.metrics(), asked.metrics()):
        known = {k: v for k, v in timeless(b).items() if not k.startswith("held_out")}
        assert known == timeless(a)


def test_a_tag_that_is_not_listed_cannot_balance_batches(tmp_path):
    config = TrainConfig(**SMALL | {"data.balance": "difficulty"})
    with pytest.raises(ValueError, match="data.balance: the data set does not list its tag"):
        train(config, tmp_path / "run")


def test_stop_file_ends_after_the_step(tmp_path, monkeypatch):
    log = Run.log

    def log_then_stop(self, row):
        log(self, row)
        (self.folder / "stop").touch()

    monkeypatch.setattr(Run, "log", log_then_stop)
    run = train(TrainConfig(**SMALL | dict(steps=5)), tmp_path / "run")
    assert run.status == "interrupted"
    assert len(run.metrics()) == 1
    assert latest_checkpoint(run.folder).name == "step-000001"


def test_the_model_card_is_true_and_travels(whole, monkeypatch):
    "No path of this machine, sealed with the rest, and its lines for peft load the adapter."
    checkpoint = latest_checkpoint(whole.folder)
    card = (checkpoint / "README.md").read_text()
    assert "More Information Needed" not in card
    assert str(Path.home()) not in card
    assert str(whole.folder.parent) not in card
    assert str(Path(dr2seg_lib.__file__).parents[1]) not in card
    assert "README.md" in read_manifest(checkpoint)["files"]
    steps = whole.metrics()[-1]["step"]
    assert f"| steps | {steps} of {steps}, " in card
    assert f"reward {whole.metrics()[-1]['reward']:.3g}" in card
    monkeypatch.chdir(checkpoint.parent)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(blocks[1], names)
    ours, theirs = Policy.load().load_adapter(checkpoint), names["model"].state_dict()
    trained = {k: v for k, v in ours.adapter.state_dict().items() if "lora_" in k}
    assert len(trained) > 20
    assert all(torch.equal(theirs[k].float(), v) for k, v in trained.items())
    exec(blocks[0].replace("RUN", str(whole.folder)), names)
    assert names["policy"].adapter is not None
    (checkpoint / "README.md").write_text(card + "changed")
    assert verify_checkpoint(checkpoint) == "README.md differs from its manifest"
    (checkpoint / "README.md").write_text(card)
    assert verify_checkpoint(checkpoint) is None


def test_saved_adapter_is_plain_peft(whole):
    from peft import PeftModel

    ours = Policy.load().load_adapter(latest_checkpoint(whole.folder))
    theirs = PeftModel.from_pretrained(Policy.load().model, str(latest_checkpoint(whole.folder)))
    a, b = ours.adapter.state_dict(), theirs.state_dict()
    assert any("lora_B" in k and v.abs().sum() > 0 for k, v in a.items())
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_user_recipe_trains_by_name(tmp_path):
    register_method(
        dataclasses.replace(visionreasoner, name="mine", added=("accuracy",), colour=None)
    )
    try:
        run = train(TrainConfig(**SMALL | dict(recipe="mine", steps=1, kl=0)), tmp_path / "run")
    finally:
        del METHODS["mine"]
    row = run.metrics()[0]
    assert row["reward"] == pytest.approx(row["terms"]["accuracy"])
    assert row["tokens_second"] is None
    assert row["kl"] == 0


MINE = """
import torch
from dr2seg_lib.methods.base import Method, stack_terms
from dr2seg_lib.methods.visionreasoner import visionreasoner
def brevity(method, group, frame):
    return stack_terms(dict(brevity=-float(r.think_tokens)) for r in group.first)
mine = Method("mine", visionreasoner.prompt, brevity)
"""


def test_a_recipe_of_a_file_trains_by_its_path(tmp_path):
    (tmp_path / "rewards.py").write_text(MINE)
    name = f"{tmp_path}/rewards.py:mine"
    config = pickle.loads(
        pickle.dumps(TrainConfig(**SMALL | dict(recipe=name, steps=1, kl=0)))
    )  # as a sweep's workers get it
    try:
        (row,) = train(config, new_folder(tmp_path, f"train-{name}")).metrics()
    finally:
        METHODS.pop(name, None)
    assert row["terms"] == {"brevity": -row["tokens"]}
    assert [p.name for p in tmp_path.glob("train-*")] == [
        f"train-{tmp_path}-rewards.py-mine-1".replace("/", "-").replace("--", "-")
    ]


@pytest.mark.parametrize(
    "code, name, says",
    [
        (MINE, "mien", "has no method mien; it has visionreasoner, mine"),
        ("1/0", "mine", "cannot be run .ZeroDivisionError"),
        (None, "mine", "does not exist"),
    ],
)
def test_a_file_without_the_recipe_is_told(code, name, says, tmp_path):
    if code:
        (tmp_path / "rewards.py").write_text(code)
    with pytest.raises(ValueError, match=says):
        check_training(TrainConfig(recipe=f"{tmp_path}/rewards.py:{name}"))


def test_questions_are_a_permutation_of_the_data():
    config, data = TrainConfig(prompts=4), list(range(8))
    epoch = [sample_batch(data, config, s)[0] for s in (1, 2)]
    assert sorted(sum(epoch, [])) == data
    assert sample_batch(data, config, 3)[0] != epoch[0]


class Worn(list):
    "Numbers, some of which cannot be read."

    bad = ()

    def __getitem__(self, i):
        if i in self.bad:
            raise BrokenRecord(f"record {i} is broken; mend it.")
        return super().__getitem__(i)


@pytest.mark.parametrize("bad", [(), (3,), (0, 1, 2, 3), range(1, 8)], ids=str)
def test_the_next_question_stands_in_for_a_broken_one(bad):
    config, data = TrainConfig(prompts=4, seed=1), Worn(range(8))
    order = sum((sample_batch(data, config, s)[0] for s in range(1, 30)), [])
    data.bad = bad
    for step in (1, 2, 3):
        samples, skipped = sample_batch(data, config, step)
        after = [i for i in order[4 * (step - 1) :] if i not in bad]
        assert samples == after[:4], "whatever was broken, a step starts at its own place"
        assert set(skipped) <= {f"record {i} is broken; mend it." for i in bad}
        assert bool(skipped) == any(i in bad for i in order[4 * step - 4 : 4 * step])


def test_nothing_that_can_be_read_is_an_error_and_strict_is_at_once():
    data = Worn(range(8))
    data.bad = range(8)
    with pytest.raises(
        ValueError, match="data: mini has no record that can be read, the first: record . is broken"
    ):
        sample_batch(data, TrainConfig(), 1)
    with pytest.raises(BrokenRecord, match="record . is broken"):
        sample_batch(data, TrainConfig(strict=True), 1)


@pytest.fixture
def own(tmp_path):
    "A folder of one's own for training and evaluation; one record of each split is broken."
    home = tmp_path / "own"
    home.mkdir()
    rows = [
        dict(
            id=f"{split}-{i}",
            image=f"{split}-{i}.png",
            query=s.query,
            mask=[encode_rle(t.mask) for t in s.targets],
            split=split,
        )
        for split in ("train", "val")
        for i, s in enumerate(MiniReasonSeg(split, 4))
    ]
    for split in ("train", "val"):
        for i, s in enumerate(MiniReasonSeg(split, 4)):
            Image.fromarray(s.image).save(home / f"{split}-{i}.png")
        (home / f"{split}-2.png").write_bytes(b"no picture")
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


def test_a_run_goes_on_past_broken_records_and_tells_them(own, tmp_path):
    given = {"steps": 2, "data": str(own), "eval_samples": 4, "evaluation.every": 0}
    config = TrainConfig(**SMALL | given)
    run = train(config, tmp_path / "run")
    results, told = (
        read_json(run.folder / "results.json"),
        [s for row in run.metrics() for s in row.get("skipped", [])],
    )
    assert results["skipped"] == {told[0]: len(told)}
    assert "data.jsonl:3: the image cannot be decoded" in told[0]
    assert results["before"]["n"] == results["after"]["n"] == 4
    assert results["after"]["broken"] == 1
    (missed,) = [r for r in read_jsonl(run.folder / "predictions_after.jsonl") if "error" in r]
    assert missed["iou"] == 0
    assert missed["sample"] == "#2"
    assert "val-2.png" not in str(told)

    with Run.create(tmp_path / "broken", config.model_dump(), bar=False):
        pass
    state = build_training_state(config)
    samples, skipped = sample_batch(load_data(str(own), "train"), config, 1)
    train_step(state, samples, config, 1)
    save_checkpoint(
        tmp_path / "broken",
        1,
        lambda d: save_state(state.policy, whole_state(state.policy, state.optimizer), d),
    )
    unevaluated = TrainConfig(**config.model_dump() | {"evaluation.samples": 0})
    resumed = train(unevaluated, tmp_path / "broken", resume=True)
    assert timeless(resumed.metrics()[0]) == timeless(run.metrics()[1])


def test_one_text_a_file_is_drawn_anew_in_each_pass(tmp_path):
    folder = tmp_path / "ReasonSeg" / "train"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20)).save(folder / f"{i}.jpg")
        (folder / f"{i}.json").write_text(
            json.dumps(dict(text=[f"{i}{k}" for k in "abcdef"], shapes=[]))
        )
    config = TrainConfig(data=str(tmp_path), texts="one", prompts=4, eval_samples=0)
    data = load_data(config.data.name, "train")
    passes = [[s.query for s in sample_batch(data, config, step)[0]] for step in (1, 2, 3)]
    assert all(sorted(q[0] for q in p) == list("0123") for p in passes)
    assert len({tuple(sorted(p)) for p in passes}) == 3
    assert passes == [[s.query for s in sample_batch(data, config, step)[0]] for step in (1, 2, 3)]
    assert len(data) == 24
    with pytest.raises(
        ValueError,
        match='data: .* has no split "val"; use one of train. '
        "Name a set for the evaluation by evaluation.data",
    ):
        check_training(TrainConfig(data=str(tmp_path)))
    with pytest.raises(ValueError, match="data.texts: mini is no ReasonSeg folder; leave it out"):
        check_training(TrainConfig(texts="one"))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(stpes=60), "stpes"),
        (dict(recipe="dr3seg"), "method .dr3seg. is unknown; use one of"),
        (dict(model="embeded"), "use embedded"),
        (dict(steps=0), "steps"),
        (dict(data="coco"), "data: coco does not exist.*called mini"),
        (dict(eval_data="coco"), "evaluation.data: coco does not exist.*called mini"),
        (dict(samples=1), "rollout.group_size"),
    ],
    ids=str,
)
def test_wrong_parameters_are_named(wrong, says):
    with pytest.raises(ValueError, match=says):
        check_training(TrainConfig(**wrong))


def test_the_notebook_declares_the_config():
    declared = parameters_of(Path(__file__).parents[2] / "nbs/experiments/train.ipynb")
    assert declared == dict(preset="", config={}, out="", resume=False)


def test_presets_are_the_papers_settings(tmp_path):
    with pytest.raises(
        ValueError, match="preset dr2seg_few_shot needs ReasonSeg's folder, by -p data PATH"
    ):
        load_preset("dr2seg_few_shot")
    with pytest.raises(ValueError, match='unknown preset "few"; known are dpad, dr2seg_7k'):
        load_preset("few")
    for split, n in dict(train=239, val=2).items():
        folder = tmp_path / "ReasonSeg" / split
        folder.mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8)).save(folder / f"{i}.jpg")
            (folder / f"{i}.json").write_text(json.dumps(dict(text=["a", "b", "c"], shapes=[])))
    few = TrainConfig(**load_preset("dr2seg_few_shot", data=str(tmp_path)))
    assert few.steps == 5 * 14
    assert (few.method.name, few.method.anchor, few.method.gamma) == ("dr2seg", 40, 0.05)
    assert few.data.texts == "one"
    assert (few.rollout.questions_per_step, few.rollout.group_size) == (16, 8)
    assert (few.model.tune, few.lora.rank, few.lora.alpha) == ("lora", 64, 64)
    optim = few.optim
    assert (optim.lr, optim.kl, optim.clip) == (1e-5, 5e-3, 0.2)
    assert (optim.weight_decay, optim.max_grad_norm) == (0.01, 1)
    by_hand = load_preset("dr2seg_few_shot", data=str(tmp_path), prompts=8, anchor=45, steps=3)
    assert (by_hand["steps"], by_hand["method"]["anchor"]) == (3, 45)
    assert by_hand["rollout"]["questions_per_step"] == 8
    assert load_preset("dr2seg_few_shot", data=str(tmp_path), prompts=8)["steps"] == 5 * 29
    with pytest.raises(ValidationError, match="rollout.questions_per_step"):
        load_preset("dr2seg_few_shot", data=str(tmp_path), prompts="many")
    seven = TrainConfig(**load_preset("dr2seg_7k", data="mini", eval_data="mini"))
    assert seven.method.name == "dr2seg_desc"
    assert seven.steps == len(load_data("mini", "train")) // 16
    assert METHODS["dr2seg_desc"].factors == (), "no length factor"


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(TrainConfig(**SMALL | dict(lr=1e30, steps=4)), tmp_path / "run")
    assert Run.open(tmp_path / "run").status == "failed"
    assert "lower lr" in read_json(tmp_path / "run/run.json")["error"]


def test_bf16_weights_with_few_projections(tmp_path):
    "As large models are trained: frozen bf16 weights, fp32 LoRA, loaded back by plain peft."
    run = train(
        TrainConfig(
            **SMALL
            | dict(
                recipe="visionreasoner",
                steps=1,
                prompts=4,
                max_new_tokens=192,
                norm_lr=0,
                dtype="bfloat16",
                targets=["q_proj", "v_proj"],
            )
        ),
        tmp_path / "run",
    )
    saved = load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors"))
    assert len(saved) == 4 * 2 * 2
    assert all(v.dtype == torch.float32 for v in saved.values())
    assert any("v_proj" in k and "lora_B" in k and v.any() for k, v in saved.items())
    with pytest.raises(ValidationError, match="bfloat16 would lose the small steps"):
        TrainConfig(dtype="bfloat16")
    with pytest.raises(ValidationError, match="targets"):
        TrainConfig(targets=["qkv"])


@pytest.mark.parametrize(
    "recipe, terms",
    [
        ("seg_zero", {"iou", "box", "points"}),
        ("pixelthink", {"points", "length"}),
        ("dpad", {"points", "discriminative"}),
        ("dr2seg_dpad", {"accuracy", "description", "length", "discriminative"}),
    ],
)
def test_every_method_of_the_field_trains(recipe, terms, tmp_path):
    run = train(
        TrainConfig(**SMALL | dict(recipe=recipe, steps=1, prompts=4, max_new_tokens=192)),
        tmp_path / "run",
    )
    row = run.metrics()[0]
    assert set(row["terms"]) >= terms
    assert row["terms"]["thinking_format"] > 0.7 < row["terms"]["answer_format"]
    assert 0 < row["accuracy"] <= 1
    assert (row["tokens_second"] is not None) == recipe.startswith("dr2seg")


def test_a_scorer_that_is_not_there_is_told_before_anything_is_asked(tmp_path):
    with pytest.raises(ValueError, match="scorer: 'clap' is not known; use embedded"):
        train(TrainConfig(**SMALL | dict(recipe="dpad", scorer="clap")), tmp_path / "run")


# ---- going on with a run whose files are not as it has left them

ENDED = SMALL | dict(
    steps=3, samples=2, max_new_tokens=12, eval_samples=2, segmenter="grabcut", norm_lr=0.02
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    return train(TrainConfig(**ENDED), tmp_path_factory.mktemp("ended") / "run")


@pytest.fixture
def cut_off(ended, tmp_path):
    "A copy of a run, as if interrupted after its third step; checkpoints of steps 2 and 3."
    shutil.copytree(ended.folder, tmp_path / "run")
    update_record(tmp_path / "run", status="interrupted")
    return tmp_path / "run"


def older(folder):
    "Takes from the manifests what older versions did not write."
    for path in folder.glob("checkpoints/*/manifest.json"):
        manifest = read_json(path)
        del manifest["rows"]
        write_json(path, manifest)


def lines(path):
    return path.read_text().splitlines(keepends=True)


def without_last(path):
    path.write_text("".join(lines(path)[:-1]))


def without_half_a_row(path):
    path.write_text(path.read_text()[:-9])


def last_altered(path):
    path.write_text("".join([*lines(path)[:-1], lines(path)[-1].replace("reward", "REWARD")]))


def last_twice(path):
    path.write_text("".join([*lines(path), lines(path)[-1]]))


def first_twice(path):
    path.write_text("".join([lines(path)[0], *lines(path)]))


def first_altered(path):
    path.write_text("".join([lines(path)[0].replace('"step": 1', '"step": 7'), *lines(path)[1:]]))


def second_missing(path):
    path.write_text("".join([lines(path)[0], *lines(path)[2:]]))


def garbage_after(path):
    path.write_text(path.read_text() + "[1]\nno JSON\n")


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize(
    "harm, goes_back_to",
    [
        (without_last, 2),
        (without_half_a_row, 2),
        (last_altered, 2),
        (last_twice, 3),
        (garbage_after, 3),
    ],
)
def test_a_resume_goes_back_to_where_the_rows_are_whole(harm, goes_back_to, name, cut_off, ended):
    harm(cut_off / name)
    run = train(TrainConfig(**ENDED), cut_off, resume=True)
    assert run.status == "done"
    assert [timeless(r) for r in run.metrics()] == [timeless(r) for r in ended.metrics()]
    assert run.rollouts() == ended.rollouts()
    same = [
        a == b
        for a, b in zip(lines(cut_off / "metrics.jsonl"), lines(ended.folder / "metrics.jsonl"))
    ]
    assert same == [step <= goes_back_to for step in (1, 2, 3)], (
        "rows that were whole are the same to the byte, the others are new"
    )


@pytest.mark.parametrize("name", ["metrics.jsonl", "rollouts.jsonl"])
@pytest.mark.parametrize(
    "harm", [Path.unlink, first_twice, first_altered, second_missing], ids=lambda f: f.__name__
)
def test_a_resume_is_refused_where_no_rows_are_whole(harm, name, cut_off):
    harm(cut_off / name)
    before = {p: p.read_bytes() for p in cut_off.rglob("*") if p.is_file() and p.name != "run.json"}
    with pytest.raises(
        ValueError,
        match="run has no checkpoint that can be gone on from "
        f".step-000003: {name}.*step-000002: {name}.*restore the files, or start",
    ):
        train(TrainConfig(**ENDED), cut_off, resume=True)
    assert {
        p: p.read_bytes() for p in cut_off.rglob("*") if p.is_file() and p.name != "run.json"
    } == before
    assert run_status(cut_off) == "failed"


def test_a_run_of_an_older_version_goes_on(cut_off, ended):
    older(cut_off)
    without_last(cut_off / "metrics.jsonl")
    run = train(TrainConfig(**ENDED), cut_off, resume=True)
    assert [timeless(r) for r in run.metrics()] == [timeless(r) for r in ended.metrics()]
    assert run.rollouts() == ended.rollouts()


@pytest.mark.parametrize(
    "harm, name",
    [
        (Path.unlink, "metrics.jsonl"),
        (Path.unlink, "rollouts.jsonl"),
        (first_twice, "metrics.jsonl"),
        (first_altered, "metrics.jsonl"),
        (second_missing, "metrics.jsonl"),
        (first_altered, "rollouts.jsonl"),
    ],
)
def test_a_run_of_an_older_version_with_a_gap_is_refused(harm, name, cut_off):
    older(cut_off)
    harm(cut_off / name)
    with pytest.raises(ValueError, match="no checkpoint that can be gone on from"):
        train(TrainConfig(**ENDED), cut_off, resume=True)


def test_rows_that_vanish_while_the_run_is_at_work_are_no_result(tmp_path, monkeypatch):
    log = Run.log

    def log_after_a_cut(self, row):
        if row["step"] == 2:
            without_last(self.folder / "metrics.jsonl")
        log(self, row)

    monkeypatch.setattr(Run, "log", log_after_a_cut)
    with pytest.raises(ValueError, match="metrics.jsonl was changed while the run was writing it"):
        train(TrainConfig(**SMALL), tmp_path / "run")
    assert run_status(tmp_path / "run") == "failed"


def lost(path):
    path.unlink()


def altered(path):
    path.write_text(
        path.read_text().replace('"iou": 0.', '"iou": 1.').replace('"tokens": 12', '"tokens": 13')
    )


def emptied(path):
    path.write_text("")


def forged(path):
    write_json(path, read_json(path) | dict(before=read_json(path)["before"] | dict(gIoU=0.99)))


def without_before(path):
    write_json(path, {k: v for k, v in read_json(path).items() if k != "before"})


@pytest.mark.parametrize(
    "harm, name",
    [
        (lost, "predictions_before.jsonl"),
        (emptied, "predictions_before.jsonl"),
        (without_last, "predictions_before.jsonl"),
        (altered, "predictions_before.jsonl"),
        (altered, "predictions_after.jsonl"),
        (lost, "results.json"),
        (forged, "results.json"),
        (without_before, "results.json"),
    ],
)
def test_results_of_a_resumed_run_are_those_of_its_predictions(harm, name, cut_off, ended):
    harm(cut_off / name)
    assert (
        not (cut_off / name).exists()
        or (cut_off / name).read_bytes() != (ended.folder / name).read_bytes()
    )
    train(TrainConfig(**ENDED), cut_off, resume=True)
    assert read_json(cut_off / "results.json") == read_json(ended.folder / "results.json")
    for kept in "predictions_before.jsonl", "predictions_after.jsonl":
        assert (cut_off / kept).read_bytes() == (ended.folder / kept).read_bytes()


@pytest.mark.parametrize(
    "text", ["[]", "null", "{", '"results"', "\ufffe", "[" * 100_000], ids=range(6)
)
def test_malformed_results_are_named(text, cut_off):
    (cut_off / "results.json").write_text(text)
    with pytest.raises(ValueError, match="results.json is .*(remove|restore) it") as told:
        train(TrainConfig(**ENDED), cut_off, resume=True)
    assert "\n" not in str(told.value)


# ---- what a resume may change


def weights(folder):
    return load_file(str(latest_checkpoint(folder) / "adapter_model.safetensors"))


def test_a_new_rate_is_in_force_after_a_resume(cut_off, ended):
    shutil.rmtree(cut_off / "checkpoints/step-000003")
    start, slow = (
        weights(cut_off),
        TrainConfig(**ENDED | dict(lr=1e-5, norm_lr=2e-4, weight_decay=0.5)),
    )
    run = train(slow, cut_off, resume=True)
    assert [r["lr"] for r in run.metrics()] == [
        pytest.approx(lr) for lr in (1e-3, 1e-3 * 2 / 3, 1e-5 / 3)
    ]

    def moved(end):
        return max(float((end[k] - start[k]).abs().max()) for k in start if "norm" not in k)

    assert moved(weights(run.folder)) == pytest.approx(
        moved(weights(ended.folder)) / 100, rel=0.1
    ), "AdamW moves by its rate"
    assert run.info["resumed"][0]["changed"] == {
        "optim.lr": [1e-3, 1e-5],
        "optim.norm_lr": [0.02, 2e-4],
        "optim.weight_decay": [0.01, 0.5],
    }
    assert run.info["parameters"]["optim"]["lr"] == 1e-5
    assert run.info["parameters"]["lora"]["rank"] == 4
    state = build_training_state(slow)
    load_state(state.policy, state.optimizer, latest_checkpoint(run.folder))
    assert [(g["base"], g["weight_decay"]) for g in state.optimizer.param_groups] == [
        (1e-5, 0.5),
        (2e-4, 0.5),
    ]


@pytest.mark.parametrize(
    "name, value",
    [
        ("lora.rank", 8),
        ("seed", 1),
        ("method", "visionreasoner"),
        ("rollout.questions_per_step", 4),
        ("data", "other"),
        ("optim.norm_lr", 0.0),
        ("rollout.temperature", 0.5),
        ("method.anchor", 20),
        ("rollout.max_new_tokens", 13),
    ],
)
def test_what_a_run_is_may_not_change(name, value, cut_off):
    before = (cut_off / "run.json").read_bytes()
    config = TrainConfig(**TrainConfig(**ENDED).model_dump() | {name: value})
    with pytest.raises(
        ValueError,
        match=f"run: the run was started with {name} = .*, not .*; leave the parameter out",
    ):
        Run.resume(cut_off, False, config)
    assert (cut_off / "run.json").read_bytes() == before


def test_with_another_evaluation_the_start_is_evaluated_again(cut_off, tmp_path):
    asked = ENDED | dict(eval_samples=3)
    fresh = train(TrainConfig(**asked), tmp_path / "fresh")
    run = train(TrainConfig(**asked), cut_off, resume=True)
    for name in "results.json", "predictions_before.jsonl", "predictions_after.jsonl":
        assert (run.folder / name).read_bytes() == (fresh.folder / name).read_bytes()


def test_a_record_of_wrong_types_is_named(cut_off):
    update_record(cut_off, parameters=read_record(cut_off)["parameters"] | dict(steps="many"))
    with pytest.raises(
        ValueError,
        match="run: the run's record cannot be gone on from "
        ".parameter steps: Input should be a valid integer",
    ):
        train(TrainConfig(**ENDED), cut_off, resume=True)


# ---- what is no number


def test_after_a_loss_that_is_no_number_the_run_goes_on_with_a_lower_rate(tmp_path):
    wild = TrainConfig(**SMALL | dict(lr=1e30, steps=4))
    with pytest.raises(FloatingPointError, match="lower lr, then resume"):
        train(wild, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoints/step-*"):
        kept = torch.load(path / "optimizer.pt", weights_only=True)["state"].values()
        assert all(
            torch.isfinite(v).all() for state in kept for v in state.values() if torch.is_tensor(v)
        )
        assert all(
            torch.isfinite(v).all()
            for v in load_file(str(path / "adapter_model.safetensors")).values()
        )
    shutil.rmtree(
        tmp_path / "run" / "checkpoints", ignore_errors=True
    )  # one with weights of 1e27 is finite, and of no use
    run = train(TrainConfig(**SMALL | dict(lr=1e-3, steps=4)), tmp_path / "run", resume=True)
    assert run.status == "done"
    assert [r["step"] for r in run.metrics()] == [1, 2, 3, 4]
    tame = train(TrainConfig(**SMALL | dict(lr=1e-3, steps=4)), tmp_path / "tame")
    assert [timeless(r) for r in run.metrics()] == [timeless(r) for r in tame.metrics()], (
        "nothing of the wild run is left"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["weight", "exp_avg", "exp_avg_sq"])
def test_a_state_that_is_no_number_is_never_saved(where, value, tmp_path):
    config = TrainConfig(**SMALL)
    state = build_training_state(config)
    policy, _, optimizer, _ = state
    train_step(state, sample_batch(load_data("mini", "train"), config, 1)[0], config, 1)
    save_checkpoint(tmp_path, 1, lambda d: save_state(policy, whole_state(policy, optimizer), d))
    name, p = (
        policy.trainable()[-1]
        if isinstance(policy.trainable(), list)
        else list(policy.trainable())[-1]
    )
    with torch.no_grad():
        (p if where == "weight" else optimizer.state[p][where]).view(-1)[-1] = value
    with pytest.raises(
        FloatingPointError, match=f"{where} of {name} is not a number, so nothing is saved"
    ):
        save_checkpoint(
            tmp_path, 2, lambda d: save_state(policy, whole_state(policy, optimizer), d)
        )
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]


def test_a_checkpoint_of_an_older_version_that_is_no_number_is_told(cut_off):
    path = cut_off / "checkpoints/step-000003"
    state = load_file(str(path / "adapter_model.safetensors"))
    name = max(state)
    state[name][0] = float("nan")
    from safetensors.torch import save_file

    save_file(state, str(path / "adapter_model.safetensors"))
    manifest = read_json(path / "manifest.json")
    manifest["files"]["adapter_model.safetensors"] = file_sha256(path / "adapter_model.safetensors")
    write_json(path / "manifest.json", manifest)
    with pytest.raises(
        ValueError,
        match="step-000003 is of no use .a weight of .* is not a number.; remove that folder",
    ):
        train(TrainConfig(**ENDED), cut_off, resume=True)


def test_a_checkpoint_of_another_rank_is_told(cut_off):
    parameters = TrainConfig(**ENDED | dict(rank=8)).model_dump()
    update_record(cut_off, parameters=parameters)
    with pytest.raises(
        ValueError, match="checkpoint .*step-000003 cannot be loaded .*remove that folder"
    ):
        train(TrainConfig(**ENDED | dict(rank=8)), cut_off, resume=True)


# ---- permissions


def test_every_file_of_a_run_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        run = train(TrainConfig(**ENDED | dict(steps=1)), tmp_path / "run")
    finally:
        os.umask(before)
    assert {oct(p.stat().st_mode & 0o777) for p in run.folder.rglob("*") if p.is_file()} == {
        "0o640"
    }
    assert {oct(p.stat().st_mode & 0o777) for p in run.folder.rglob("*") if p.is_dir()} == {"0o750"}
