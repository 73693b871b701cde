"The loop: same seed, same metrics; stop and resume; what a run leaves behind."
import dataclasses
import json
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from dr2seg_lib import recipes, runs
from dr2seg_lib.cli import parameters_of
from dr2seg_lib.evaluation import load_data
from dr2seg_lib.masks import encode
from dr2seg_lib.policy import Policy
from dr2seg_lib.readers import BrokenRecord
from dr2seg_lib.runs import Run, latest_checkpoint, read_json, read_jsonl, save_checkpoint
from dr2seg_lib.scenes import MiniReasonSeg
from dr2seg_lib.training import TrainConfig, preset, prepared, questions, save_state, train, train_step

SMALL = dict(steps=2, prompts=2, samples=3, rank=4, alpha=4, eval_samples=0, max_new_tokens=60, checkpoint_every=1)
TOGETHER = SMALL | dict(prompts=4, eval_samples=5, record=4)
timeless = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


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
    assert set(row) >= {"step", "reward", "terms", "accuracy", "tokens", "tokens_second", "answer_entropy", "kl", "loss", "lr", "grad_norm", "seconds", "tokens_per_second"}
    assert set(row["seconds"]) == {"first", "second", "reward", "reference", "update", "total"}
    assert set(row["terms"]) == {"thinking_format", "answer_format", "non_repeat", "accuracy", "description", "length"}
    assert "".join(record["first"]["tokens"]) == record["first"]["text"] and len(record["first"]["entropy"]) == len(record["first"]["tokens"])
    t = record["terms"]
    assert record["reward"] == pytest.approx((t["thinking_format"] + t["answer_format"] + t["non_repeat"] + t["accuracy"] + t["description"]) * t["length"])
    assert len(whole.rollouts()) == 2 * 2 * 3 and whole.info["frame"] == 112


@pytest.mark.parametrize("settings", [{}, dict(updates=2), dict(tune="full", lr=1e-4), dict(norm_lr=1e-2)], ids=str)
def test_resume_is_bit_exact(settings, tmp_path):
    config = TrainConfig(**SMALL | settings)
    unbroken = train(config, tmp_path / "unbroken")
    with Run.create(tmp_path / "broken", config.model_dump(), bar=False): pass
    policy, recipe, optimizer, accelerator = prepared(config)
    row, _ = train_step(policy, recipe, optimizer, accelerator, questions(load_data("mini", "train"), config, 1)[0], config, 1)
    save_checkpoint(tmp_path / "broken", 1, lambda d: save_state(policy, optimizer, d))
    resumed = train(config, tmp_path / "broken", resume=True)
    assert timeless(row) == timeless(unbroken.metrics()[0]) and timeless(resumed.metrics()[0]) == timeless(unbroken.metrics()[1])
    for path in latest_checkpoint(unbroken.folder).glob("*.safetensors"):
        a, b = load_file(str(path)), load_file(str(latest_checkpoint(resumed.folder) / path.name))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_chunks_change_memory_only(tmp_path):
    rows = [timeless(train(TrainConfig(**SMALL | dict(steps=1, chunk=c, kl=0.1)), tmp_path / str(c)).metrics()[0]) for c in (1, 2)]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4) and rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory): return train(TrainConfig(**TOGETHER), tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize("memory", [dict(), dict(shard=True, checkpointing=True)], ids=["whole", "sharded"])
def test_two_processes_give_the_metrics_of_one(tmp_path, alone, memory):
    one, two = alone, train(TrainConfig(**TOGETHER | memory | dict(processes=2)), tmp_path / "two")
    numbers = lambda row: {k: v for k, v in row.items() if isinstance(v, float) and k != "tokens_per_second"} | row["terms"]
    assert [numbers(r) for r in two.metrics()] == [pytest.approx(numbers(r), abs=1e-5) for r in one.metrics()]
    said = lambda run: [(r["step"], r["sample"], r["rollout"], r["first"]["text"], r["second"] and r["second"]["text"]) for r in run.rollouts()]
    assert said(two) == said(one) and len(said(one)) == 2 * 4 * 3
    for when in ("before", "after"):
        a, b = (read_json(run.folder / "results.json")[when] for run in (one, two))
        assert a["n"] == b["n"] == 5 and a["gIoU"] == pytest.approx(b["gIoU"], abs=1e-5)
    a, b = (load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors")) for run in (one, two))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


def test_only_frozen_weights_are_divided():
    with pytest.raises(ValidationError, match="shard: only frozen weights are divided.*use tune lora"): TrainConfig(shard=True, tune="full")


def test_questions_must_be_shared_evenly():
    with pytest.raises(ValidationError, match="prompts: 16 questions a step cannot be shared by 3 processes; use a multiple of it"): TrainConfig(processes=3)


def test_stop_file_ends_after_the_step(tmp_path, monkeypatch):
    log = Run.log
    def log_then_stop(self, row): log(self, row); (self.folder / "stop").touch()
    monkeypatch.setattr(Run, "log", log_then_stop)
    run = train(TrainConfig(**SMALL | dict(steps=5)), tmp_path / "run")
    assert run.status == "interrupted" and len(run.metrics()) == 1 and latest_checkpoint(run.folder).name == "step-000001"


def test_saved_adapter_is_plain_peft(whole):
    from peft import PeftModel
    ours = Policy.load().load_adapter(latest_checkpoint(whole.folder))
    theirs = PeftModel.from_pretrained(Policy.load().model, str(latest_checkpoint(whole.folder)))
    a, b = ours.adapter.state_dict(), theirs.state_dict()
    assert any("lora_B" in k and v.abs().sum() > 0 for k, v in a.items()) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_user_recipe_trains_by_name(tmp_path):
    recipes.register(dataclasses.replace(recipes.visionreasoner, name="mine", total=lambda terms: terms["accuracy"]))
    try: run = train(TrainConfig(**SMALL | dict(recipe="mine", steps=1, kl=0)), tmp_path / "run")
    finally: del recipes.RECIPES["mine"]
    row = run.metrics()[0]
    assert row["reward"] == pytest.approx(row["terms"]["accuracy"]) and row["tokens_second"] is None and row["kl"] == 0


MINE = """
import torch
from dr2seg_lib.recipes import Recipe, summed, visionreasoner
mine = Recipe("mine", visionreasoner.prompt, lambda recipe, group, frame: dict(brevity=-torch.tensor([float(r.think_tokens) for r in group.first])), summed)
"""


def test_a_recipe_of_a_file_trains_by_its_path(tmp_path):
    (tmp_path / "rewards.py").write_text(MINE)
    name = f"{tmp_path}/rewards.py:mine"
    config = pickle.loads(pickle.dumps(TrainConfig(**SMALL | dict(recipe=name, steps=1, kl=0)))) # as a sweep's workers get it
    del recipes.RECIPES[name]
    try: row, = train(config, runs.new_folder(tmp_path, f"train-{name}")).metrics()
    finally: recipes.RECIPES.pop(name, None)
    assert row["terms"] == {"brevity": -row["tokens"]}
    assert [p.name for p in tmp_path.glob("train-*")] == [f"train-{tmp_path}-rewards.py-mine-1".replace("/", "-").replace("--", "-")]


@pytest.mark.parametrize("code, name, says", [(MINE, "mien", "has no recipe mien; it has visionreasoner, mine"), ("1/0", "mine", "cannot be run .ZeroDivisionError"), (None, "mine", "does not exist")])
def test_a_file_without_the_recipe_is_told(code, name, says, tmp_path):
    if code: (tmp_path / "rewards.py").write_text(code)
    with pytest.raises(ValueError, match=says): TrainConfig(recipe=f"{tmp_path}/rewards.py:{name}")


def test_questions_are_a_permutation_of_the_data():
    config, data = TrainConfig(prompts=4), list(range(8))
    epoch = [questions(data, config, s)[0] for s in (1, 2)]
    assert sorted(sum(epoch, [])) == data and questions(data, config, 3)[0] != epoch[0]


class Worn(list):
    "Numbers, some of which cannot be read."
    bad = ()
    def __getitem__(self, i):
        if i in self.bad: raise BrokenRecord(f"record {i} is broken; mend it.")
        return super().__getitem__(i)


@pytest.mark.parametrize("bad", [(), (3,), (0, 1, 2, 3), range(1, 8)], ids=str)
def test_the_next_question_stands_in_for_a_broken_one(bad):
    config, data = TrainConfig(prompts=4, seed=1), Worn(range(8))
    order = sum((questions(data, config, s)[0] for s in range(1, 30)), [])
    data.bad = bad
    for step in (1, 2, 3):
        samples, skipped = questions(data, config, step)
        after = [i for i in order[4 * (step - 1):] if i not in bad]
        assert samples == after[:4], "whatever was broken, a step starts at its own place"
        assert set(skipped) <= {f"record {i} is broken; mend it." for i in bad} and bool(skipped) == any(i in bad for i in order[4 * step - 4:4 * step])


def test_nothing_that_can_be_read_is_an_error_and_strict_is_at_once():
    data = Worn(range(8))
    data.bad = range(8)
    with pytest.raises(ValueError, match="data: mini has no record that can be read, the first: record . is broken"): questions(data, TrainConfig(), 1)
    with pytest.raises(BrokenRecord, match="record . is broken"): questions(data, TrainConfig(strict=True), 1)


@pytest.fixture
def own(tmp_path):
    "A folder of one's own with scenes of the world, for training and for evaluation; one record of each split is broken."
    home = tmp_path / "own"
    home.mkdir()
    rows = [dict(id=f"{split}-{i}", image=f"{split}-{i}.png", query=s.query, mask=[encode(t.mask) for t in s.targets], split=split)
            for split in ("train", "val") for i, s in enumerate(MiniReasonSeg(split, 4))]
    for split in ("train", "val"):
        for i, s in enumerate(MiniReasonSeg(split, 4)): Image.fromarray(s.image).save(home / f"{split}-{i}.png")
        (home / f"{split}-2.png").write_bytes(b"no picture")
    (home / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


def test_a_run_goes_on_past_broken_records_and_tells_them(own, tmp_path):
    config = TrainConfig(**SMALL | dict(steps=2, data=str(own), eval_samples=4))
    run = train(config, tmp_path / "run")
    results, told = read_json(run.folder / "results.json"), [s for row in run.metrics() for s in row.get("skipped", [])]
    assert results["skipped"] == {told[0]: len(told)} and "data.jsonl:3: the image cannot be decoded" in told[0]
    assert results["before"]["n"] == results["after"]["n"] == 4 and results["after"]["broken"] == 1
    missed, = [r for r in read_jsonl(run.folder / "predictions_after.jsonl") if "error" in r]
    assert missed["iou"] == 0 and missed["sample"] == "#2" and "val-2.png" not in str(told)

    with Run.create(tmp_path / "broken", config.model_dump(), bar=False): pass
    policy, recipe, optimizer, accelerator = prepared(config)
    samples, skipped = questions(load_data(str(own), "train"), config, 1)
    train_step(policy, recipe, optimizer, accelerator, samples, config, 1)
    save_checkpoint(tmp_path / "broken", 1, lambda d: save_state(policy, optimizer, d))
    resumed = train(config.model_copy(update=dict(eval_samples=0)), tmp_path / "broken", resume=True)
    assert timeless(resumed.metrics()[0]) == timeless(run.metrics()[1])


def test_one_text_a_file_is_drawn_anew_in_each_pass(tmp_path):
    folder = tmp_path / "ReasonSeg" / "train"
    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20)).save(folder / f"{i}.jpg")
        (folder / f"{i}.json").write_text(json.dumps(dict(text=[f"{i}{k}" for k in "abcdef"], shapes=[])))
    config = TrainConfig(data=str(tmp_path), texts="one", prompts=4, eval_samples=0)
    data = load_data(config.data, "train")
    passes = [[s.query for s in questions(data, config, step)[0]] for step in (1, 2, 3)]
    assert all(sorted(q[0] for q in p) == list("0123") for p in passes) and len({tuple(sorted(p)) for p in passes}) == 3
    assert passes == [[s.query for s in questions(data, config, step)[0]] for step in (1, 2, 3)] and len(data) == 24
    with pytest.raises(ValidationError, match="data: .* has no split \"val\"; use one of train. Name a set for the evaluation by eval_data"):
        TrainConfig(data=str(tmp_path))
    with pytest.raises(ValidationError, match="texts: mini has one text a question; leave texts out"): TrainConfig(texts="one")


@pytest.mark.parametrize("wrong, says", [(dict(stpes=60), "stpes"), (dict(recipe="dr3seg"), "use one of visionreasoner"), (dict(model="embeded"), "use embedded"),
                                         (dict(steps=0), "steps"), (dict(data="coco"), "data: coco does not exist.*called mini"), (dict(eval_data="coco"), "eval_data: coco does not exist.*called mini"), (dict(samples=1), "samples")], ids=str)
def test_wrong_parameters_are_named(wrong, says):
    with pytest.raises(ValidationError, match=says): TrainConfig(**wrong)


def test_the_notebook_declares_the_config():
    declared = parameters_of(Path(__file__).parents[1] / "nbs/experiments/train.ipynb")
    defaults = {k: v for k, v in declared.items() if k not in ("out", "resume")}
    assert TrainConfig(**defaults) == TrainConfig()


def test_presets_are_the_papers_settings(tmp_path):
    with pytest.raises(ValueError, match="preset reasonseg_few_shot needs ReasonSeg's folder; name it by data"): preset("reasonseg_few_shot")
    with pytest.raises(ValueError, match="preset few is unknown; use one of reasonseg_few_shot, visionreasoner_7k"): preset("few")
    for split, n in dict(train=239, val=2).items():
        folder = tmp_path / "ReasonSeg" / split
        folder.mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8)).save(folder / f"{i}.jpg")
            (folder / f"{i}.json").write_text(json.dumps(dict(text=["a", "b", "c"], shapes=[])))
    few = TrainConfig(**preset("reasonseg_few_shot", data=str(tmp_path)))
    assert few.steps == 5 * 14 and (few.recipe, few.texts, few.anchor, few.gamma, few.prompts, few.samples) == ("dr2seg", "one", 40, 0.05, 16, 8)
    assert (few.tune, few.rank, few.alpha, few.lr, few.kl, few.clip, few.weight_decay, few.grad_norm) == ("lora", 64, 64, 1e-5, 5e-3, 0.2, 0.01, 1)
    by_hand = preset("reasonseg_few_shot", data=str(tmp_path), prompts=8, anchor=45, steps=3)
    assert (by_hand["steps"], by_hand["anchor"], by_hand["prompts"]) == (3, 45, 8)
    assert preset("reasonseg_few_shot", data=str(tmp_path), prompts=8)["steps"] == 5 * 29
    assert "steps" not in preset("reasonseg_few_shot", data=str(tmp_path), prompts="many")
    seven = TrainConfig(**preset("visionreasoner_7k", data="mini", eval_data="mini"))
    assert seven.recipe == "dr2seg_desc" and seven.steps == len(load_data("mini", "train")) // 16
    assert recipes.RECIPES["dr2seg_desc"].total is recipes.summed, "no length factor"


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"): train(TrainConfig(**SMALL | dict(lr=1e30, steps=4)), tmp_path / "run")
    assert Run.open(tmp_path / "run").status == "failed" and "lower lr" in read_json(tmp_path / "run/run.json")["error"]


def test_bf16_weights_with_few_projections(tmp_path):
    "As large models are trained: frozen weights in bf16, LoRA on two projections in fp32, loaded back by plain peft."
    run = train(TrainConfig(**SMALL | dict(recipe="visionreasoner", steps=1, norm_lr=0, dtype="bfloat16", targets=["q_proj", "v_proj"])), tmp_path / "run")
    saved = load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors"))
    assert len(saved) == 4 * 2 * 2 and all(v.dtype == torch.float32 for v in saved.values()) and any("v_proj" in k and "lora_B" in k and v.any() for k, v in saved.items())
    with pytest.raises(ValidationError, match="bfloat16 would lose the small steps"): TrainConfig(dtype="bfloat16")
    with pytest.raises(ValidationError, match="targets"): TrainConfig(targets=["qkv"])


@pytest.mark.parametrize("recipe, terms", [("seg_zero", {"iou", "box", "points"}), ("pixelthink", {"points", "length"}),
                                           ("dpad", {"points", "discriminative"}), ("dr2seg_dpad", {"accuracy", "description", "length", "discriminative"})])
def test_every_method_of_the_field_trains(recipe, terms, tmp_path):
    run = train(TrainConfig(**SMALL | dict(recipe=recipe, steps=1, prompts=4, max_new_tokens=192)), tmp_path / "run")
    row = run.metrics()[0]
    assert set(row["terms"]) >= terms and row["terms"]["thinking_format"] > 0.7 < row["terms"]["answer_format"] and 0 < row["accuracy"] <= 1
    assert (row["tokens_second"] is not None) == recipe.startswith("dr2seg")


def test_a_scorer_that_is_not_there_is_told_before_anything_is_asked(tmp_path):
    with pytest.raises(ValueError, match="scorer: 'clap' is not known; use embedded"): train(TrainConfig(**SMALL | dict(recipe="dpad", scorer="clap")), tmp_path / "run")
