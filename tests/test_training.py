"The loop: same seed, same metrics; stop and resume; what a run leaves behind."
import dataclasses
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from dr2seg_lib import recipes
from dr2seg_lib.cli import parameters_of
from dr2seg_lib.evaluation import load_data
from dr2seg_lib.policy import Policy
from dr2seg_lib.runs import Run, latest_checkpoint, read_json, save_checkpoint
from dr2seg_lib.training import TrainConfig, prepared, questions, save_state, train, train_step

SMALL = dict(steps=2, prompts=2, samples=3, rank=4, alpha=4, eval_samples=0, max_new_tokens=60, checkpoint_every=1)
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
    assert len(whole.rollouts()) == 2 * 2 * 3


@pytest.mark.parametrize("settings", [{}, dict(updates=2), dict(tune="full", lr=1e-4), dict(norm_lr=1e-2)], ids=str)
def test_resume_is_bit_exact(settings, tmp_path):
    config = TrainConfig(**SMALL | settings)
    unbroken = train(config, tmp_path / "unbroken")
    with Run.create(tmp_path / "broken", config.model_dump(), bar=False): pass
    policy, recipe, optimizer, accelerator = prepared(config)
    row, _ = train_step(policy, recipe, optimizer, accelerator, questions(load_data("mini", "train"), config, 1), config, 1)
    save_checkpoint(tmp_path / "broken", 1, lambda d: save_state(policy, optimizer, d))
    resumed = train(config, tmp_path / "broken", resume=True)
    assert timeless(row) == timeless(unbroken.metrics()[0]) and timeless(resumed.metrics()[0]) == timeless(unbroken.metrics()[1])
    for path in latest_checkpoint(unbroken.folder).glob("*.safetensors"):
        a, b = load_file(str(path)), load_file(str(latest_checkpoint(resumed.folder) / path.name))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_chunks_change_memory_only(tmp_path):
    rows = [timeless(train(TrainConfig(**SMALL | dict(steps=1, chunk=c, kl=0.1)), tmp_path / str(c)).metrics()[0]) for c in (1, 2)]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4) and rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-6)


def test_two_processes_give_the_metrics_of_one(tmp_path):
    settings = SMALL | dict(prompts=4, eval_samples=5, record=4)
    one, two = (train(TrainConfig(**settings | dict(processes=n)), tmp_path / str(n)) for n in (1, 2))
    numbers = lambda row: {k: v for k, v in row.items() if isinstance(v, float) and k != "tokens_per_second"} | row["terms"]
    assert [numbers(r) for r in two.metrics()] == [pytest.approx(numbers(r), abs=1e-5) for r in one.metrics()]
    said = lambda run: [(r["step"], r["sample"], r["rollout"], r["first"]["text"], r["second"] and r["second"]["text"]) for r in run.rollouts()]
    assert said(two) == said(one) and len(said(one)) == 2 * 4 * 3
    for when in ("before", "after"):
        a, b = (read_json(run.folder / "results.json")[when] for run in (one, two))
        assert a["n"] == b["n"] == 5 and a["gIoU"] == pytest.approx(b["gIoU"], abs=1e-5)
    a, b = (load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors")) for run in (one, two))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)


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


def test_questions_are_a_permutation_of_the_data():
    config, data = TrainConfig(prompts=4), list(range(8))
    epoch = [questions(data, config, s) for s in (1, 2)]
    assert sorted(sum(epoch, [])) == data and questions(data, config, 3) != epoch[0]


@pytest.mark.parametrize("wrong, says", [(dict(stpes=60), "stpes"), (dict(recipe="dr3seg"), "use one of visionreasoner"), (dict(model="embeded"), "use embedded"),
                                         (dict(steps=0), "steps"), (dict(data="coco"), "coco does not exist.*called mini"), (dict(samples=1), "samples")], ids=str)
def test_wrong_parameters_are_named(wrong, says):
    with pytest.raises(ValidationError, match=says): TrainConfig(**wrong)


def test_the_notebook_declares_the_config():
    declared = parameters_of(Path(__file__).parents[1] / "nbs/experiments/train.ipynb")
    assert {k: v for k, v in declared.items() if k not in ("out", "resume")} == TrainConfig().model_dump()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower lr"): train(TrainConfig(**SMALL | dict(lr=1e30, steps=4)), tmp_path / "run")
    assert Run.open(tmp_path / "run").status == "failed" and "lower lr" in read_json(tmp_path / "run/run.json")["error"]
