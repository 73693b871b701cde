"Parameters by name, type and bounds: without a disk, without torch."

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from dr2seg_lib.core.known_names import find_unknown_name
from dr2seg_lib.core.parameter_names import (
    EVALUATION_NAMES,
    REA2SEG_NAMES,
    TRAINING_NAMES,
    flat_parameters,
    nested_parameters,
    renamed_note,
)
from dr2seg_lib.core.parameters import (
    EvaluateConfig,
    Rea2SegConfig,
    TrainConfig,
    changed_parameters,
)
from dr2seg_lib.core.presets import (
    check_needs,
    deviations,
    evaluated_as,
    published_presets,
    read_preset,
    with_preset,
)

KINDS = [TrainConfig, EvaluateConfig, Rea2SegConfig]
NUMBERS = [name for name, value in TrainConfig().flat().items() if isinstance(value, float)]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("module", ["parameters", "presets", "known_names", "parameter_table"])
def test_torch_is_not_imported(module):
    heavy = "{'torch', 'transformers'} & {*sys.modules}"
    code = f"import sys, dr2seg_lib.core.{module}; print(*({heavy}))"
    assert run_python(code) == []


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_number_is_finite(name, value):
    with pytest.raises(ValidationError, match=name):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model, limit", [("embedded", 192), ("Qwen/Qwen2.5-VL-7B-Instruct", 1024)])
def test_the_length_of_an_answer_follows_the_model(kind, model, limit):
    assert kind(model=model).rollout.max_new_tokens == limit
    assert kind(model=model, max_new_tokens=0).rollout.max_new_tokens == limit
    assert kind(model=model, rollout={"max_new_tokens": 77}).rollout.max_new_tokens == 77


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(method="dr3seg"), "use one of dr2seg, visionreasoner"),
        (dict(model="embeded"), "use embedded, a local folder"),
        (dict(data="coco"), "data: coco does not exist"),
        (dict(eval_data="coco"), "evaluation.data: coco does not exist"),
    ],
)
def test_unknown_names_are_told(wrong, says):
    methods = ["dr2seg", "visionreasoner"]
    assert says in find_unknown_name(TrainConfig(**wrong).model_dump(), methods)


# ---- nested, dotted, flat


@pytest.mark.parametrize(
    "values",
    [
        dict(lora={"rank": 8}, method={"name": "dpad"}, steps=3),
        {"lora.rank": 8, "method.name": "dpad", "steps": 3},
        {"lora.rank": 8, "method": "dpad", "steps": 3},
        dict(rank=8, recipe="dpad", steps=3),
        {"lora": {"rank": 16}, "lora.rank": 8, "recipe": "dpad", "steps": 3},
    ],
    ids=["nested", "dotted", "short", "of version 0.1", "the last holds"],
)
def test_one_configuration_has_several_spellings(values):
    expected = TrainConfig(lora={"rank": 8}, method={"name": "dpad"}, steps=3)
    assert TrainConfig(**values) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_survives_its_record(kind):
    config = kind(model="Qwen/Qwen2.5-VL-7B-Instruct", seed=3) if kind is TrainConfig else kind()
    assert kind(**json.loads(json.dumps(config.model_dump()))) == config
    assert kind(**config.flat()) == config
    assert kind.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    "kind, names",
    [
        (TrainConfig, TRAINING_NAMES),
        (EvaluateConfig, EVALUATION_NAMES),
        (Rea2SegConfig, REA2SEG_NAMES),
    ],
)
def test_old_names_lead_to_fields(kind, names):
    known = kind().flat()
    if kind is not Rea2SegConfig:
        assert set(names.values()) - {""} <= set(known)
    assert kind(**{name: known[new] for name, new in names.items() if new in known}) == kind()


def test_every_field_of_version_0_1_has_a_place():
    "The flat names that a training had, each with a place in the nested configuration."
    old = """recipe model server segmenter data texts strict eval_data allow_overlap seed steps
    prompts samples temperature max_new_tokens max_question_tokens anchor gamma tune rank
    alpha targets dtype attention lr norm_lr schedule weight_decay grad_norm kl clip
    updates advantage_scale chunk eval_samples record checkpoint_every scorer processes
    checkpointing shard""".split()
    new = [TRAINING_NAMES.get(name, name) for name in old]
    added = {f"runtime.{name}" for name in ("max_tokens", "self_check", "answers_at_once")}
    added |= {"evaluation.every", "evaluation.every_samples", "data.balance", "start", "start_form"}
    added |= {"data.difficulty", "method.prompt", "method.newline", "data.polygons"}
    added |= {"rollout.redraws", "runtime.nodes", "runtime.rendezvous"}
    added |= {"model.quantize", "data.max_pixels", "runtime.offload"}
    added |= {"optim.states", "trackers"}
    added |= {f"trackers.{name}" for name in ("project", "group", "pictures_every")}
    added |= {f"optim.{name}" for name in ("warmup", "average", "kl_most", "entropy", "clip_high")}
    gone = [""]  # chunk: a forward is bounded by its tokens
    assert sorted(new) == sorted([*gone, *TrainConfig().flat().keys() - added])


def test_an_evaluation_of_version_0_1_is_told_from_a_training():
    training = flat_parameters(dict(recipe="dpad", samples=4))
    evaluation = flat_parameters(dict(recipe="dpad", split="val", samples=4))
    assert training == {"method": "dpad", "rollout.group_size": 4}
    assert evaluation == {"method": "dpad", "data.split": "val", "data.samples": 4}


def test_what_no_configuration_knows_stays_as_it_is():
    warm_start = dict(steps=3, lr=1e-3, rank=8, batch=2)
    assert nested_parameters(warm_start) == flat_parameters(warm_start) == warm_start


def test_old_names_are_told_with_their_new_ones():
    assert renamed_note({"lora.rank": 8, "method": "dpad"}, TRAINING_NAMES) == ""
    assert renamed_note({"rank": 8}, TRAINING_NAMES).startswith("rank is now lora.rank;")


@pytest.mark.parametrize(
    "wrong", [{"lora.rnak": 8}, {"lora": {"rnak": 8}}, {"lroa.rank": 8}], ids=str
)
def test_an_unknown_name_is_refused(wrong):
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        TrainConfig(**wrong)


def test_a_record_of_version_0_1_goes_on():
    old = dict(recipe="dpad", rank=8, lr=1e-3, data="mini", steps=3)
    now = TrainConfig(method="dpad", steps=3, lora={"rank": 8}, optim={"lr": 1e-4})
    assert changed_parameters(old, now) == {"optim.lr": [1e-3, 1e-4]}


# ---- presets

COMMON = {
    "model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "segmenter": "facebook/sam2-hiera-large",
    "rollout.questions_per_step": 16,
    "rollout.group_size": 8,
    "rollout.temperature": 1.0,
    "method.advantage_scale": "group",
    "model.tune": "lora",
    "model.dtype": "bfloat16",
    "lora.rank": 64,
    "lora.alpha": 64,
    "optim.lr": 1e-5,
    "optim.norm_lr": 0.0,
    "optim.schedule": "constant",
    "optim.weight_decay": 0.01,
    "optim.max_grad_norm": 1.0,
    "optim.kl": 5e-3,
    "optim.clip": 0.2,
    "optim.updates": 1,
    "optim.average": "answers",
    "optim.entropy": 1e-3,
    "optim.kl_most": 10.0,
    "runtime.max_tokens": 8192,
    "runtime.gradient_checkpointing": True,
    "evaluation.data": "Ricky06662/ReasonSeg_val",
    "evaluation.samples": 200,
    "evaluation.every": 50,
    "evaluation.every_samples": 64,
}
BY_7K = {
    "epochs": 1,
    "method.newline": True,
    "data": "Ricky06662/VisionReasoner_multi_object_7k_840",
    "rollout.max_new_tokens": 2000,
}
SECOND = {
    "epochs": 5,
    "method": "dr2seg",
    "method.anchor": 40.0,
    "method.gamma": 0.05,
    "method.newline": True,
    "data.texts": "one",
    "evaluation.data": "",
    "rollout.max_new_tokens": 2000,
}
SINGLE = {
    "epochs": 1,
    "method": "seg_zero",
    "data": "Ricky06662/refCOCOg_9k_840",
    "rollout.max_new_tokens": 2000,
}
OWN = {
    "visionreasoner_7k": BY_7K | {"method": "visionreasoner", "optim.kl": 1e-2},
    "dr2seg_7k": BY_7K | {"method": "dr2seg_desc"},
    "dr2seg_few_shot": SECOND,
    "dr2seg_star": SECOND | {"start_form": "merged"},
    "seg_zero": SINGLE,
    "pixelthink": SINGLE | {"method": "pixelthink", "rollout.max_new_tokens": 1300},
    "dpad": {
        "epochs": 1,
        "method": "dpad",
        "method.scorer": "ViT-B-32:openai",
        "rollout.max_new_tokens": 1300,
    },
}
SMALLER = {"model": "Qwen/Qwen2.5-VL-3B-Instruct"}
SMALL = "visionreasoner_7k", "dr2seg_7k", "dr2seg_few_shot", "dr2seg_star", "seg_zero"
OWN |= {f"{name}_3b": OWN[name] | SMALLER for name in SMALL}


def test_presets_are_those_published():
    assert set(published_presets()) == {*OWN, "embedded", "full_tuning"}


@pytest.mark.parametrize("name", OWN)
def test_a_preset_holds_the_papers_values(name):
    assert flat_parameters(read_preset(name)) == COMMON | OWN[name]


def test_the_embedded_preset_is_the_default():
    assert read_preset("embedded") == {}


@pytest.mark.parametrize("name", published_presets())
def test_where_a_preset_is_not_what_was_published_is_said(name):
    given = flat_parameters(with_preset(name, {"data": "x", "start": "y"}))
    remarks = deviations(name, given)
    assert ("model.tune lora: an adapter in place of all weights" in remarks) is (name in OWN)
    changed = deviations(name, given | {"optim.clip": 0.3})
    assert ("optim.clip 0.3: yours, in place of 0.2" in changed) is (name in OWN)


@pytest.mark.parametrize("name", OWN)
def test_all_weights_are_tuned_at_the_peers_rate_and_precision(name):
    "Seg-Zero's scripts: lr 1.0e-6; its trainer: float32 weights, bf16 compute, full shard."
    both = f"{name}+full_tuning"
    values = with_preset(both, {})
    flat = flat_parameters(values)
    assert {k: flat[k] for k in ("model.tune", "model.dtype", "optim.lr", "runtime.shard")} == {
        "model.tune": "full",
        "model.dtype": "bfloat16",
        "optim.lr": 1e-6,
        "runtime.shard": True,
    }
    assert flat["optim.kl"] == (COMMON | OWN[name])["optim.kl"]
    remarks = deviations(both, flat)
    assert remarks == "model.tune full: the vision tower stays as it is, which the peers train too"
    config = TrainConfig(**{k: v for k, v in values.items() if k not in ("epochs", "start_form")})
    assert config.rollout.questions_per_step % config.runtime.processes == 0


def test_the_last_of_several_presets_has_the_word(tmp_path):
    mine = tmp_path / "mine.toml"
    mine.write_text("[optim]\nkl = 0.2\nlr = 3e-6\n[lora]\nrank = 2\n")
    assert read_preset(f"seg_zero+{mine}")["optim"]["kl"] == 0.2
    assert read_preset(f"{mine}+seg_zero")["optim"]["kl"] == COMMON["optim.kl"]
    with pytest.raises(ValueError, match='unknown preset "full_tuned"; did you mean "full_tuning"'):
        read_preset("seg_zero+full_tuned")
    with pytest.raises(ValueError, match="unknown preset"):
        read_preset("seg_zero+")


def test_a_preset_says_what_it_needs():
    with pytest.raises(ValueError, match="preset dr2seg_star needs ReasonSeg's folder, by -p data"):
        check_needs("dr2seg_star", {})
    with pytest.raises(ValueError, match="needs the last checkpoint of a run of dr2seg_7k"):
        check_needs("dr2seg_star", {"data": "ReasonSeg"})
    with pytest.raises(ValueError, match="preset dpad needs 3,000 samples of RefCOCOg"):
        check_needs("dpad", {})


def test_a_preset_of_ones_own_extends_a_published_one_or_its_neighbour(tmp_path):
    mine, below = tmp_path / "mine.toml", tmp_path / "below.toml"
    mine.write_text('# Mine.\nextends = "dr2seg_7k"\n[optim]\nkl = 0.1\n')
    own = flat_parameters(read_preset(str(mine)))
    assert own == flat_parameters(read_preset("dr2seg_7k")) | {"optim.kl": 0.1}
    mine.write_text('# Mine.\nextends = "below"\nseed = 2\n')
    below.write_text('# Below.\nsteps = 3\nseed = 1\n[needs]\ndata = "a folder"\n')
    assert read_preset(str(mine)) == dict(steps=3, seed=2)
    with pytest.raises(ValueError, match="needs a folder"):
        check_needs(str(mine), {})
    below.write_text('extends = "mine"\n')
    with pytest.raises(ValueError, match="mine.toml extends itself"):
        read_preset(str(mine))
    mine.write_text('extends = "nothing"\n')
    with pytest.raises(ValueError, match='unknown preset "nothing"'):
        read_preset(str(mine))


def test_a_preset_of_ones_own_is_a_file(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('method = "dpad"\n[lora]\nrank = 4\n')
    assert TrainConfig(**with_preset(str(path), {"steps": 2})).lora.rank == 4
    path.write_text("rank = = 4")
    with pytest.raises(ValueError, match="mine.toml cannot be read .*; correct it"):
        read_preset(str(path))


@pytest.mark.parametrize("preset", published_presets())
def test_an_evaluation_takes_a_presets_model_method_and_data(preset):
    published = flat_parameters(read_preset(preset), {})
    config = EvaluateConfig(**evaluated_as(preset, {"data.samples": 7}))
    assert config.data.samples == 7
    assert config.method.name == published.get("method", "dr2seg")
    assert config.model.name == published.get("model", "embedded")
    assert config.rollout.max_new_tokens == published.get("rollout.max_new_tokens", 192)
    hub = str(published.get("evaluation.data", "")).startswith("Ricky06662/")
    assert (config.data.protocol == "visionreasoner") == hub
    own = EvaluateConfig(**evaluated_as(preset, {"data": "mini", "method": "dpad"}))
    assert (own.data.name, own.data.protocol, own.method.name) == ("mini", "lisa", "dpad")
