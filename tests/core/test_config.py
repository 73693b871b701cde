"Parameters by name, type and bounds: without a disk, without torch."

import subprocess
import sys

import pytest
from pydantic import ValidationError

from dr2seg_lib.core.parameters import EvaluateFields, Rea2SegFields, TrainFields, find_unknown_name

NUMBERS = [n for n, f in TrainFields.model_fields.items() if f.annotation is float]


def test_torch_is_not_imported():
    code = "import sys, dr2seg_lib.core.parameters; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=str)
def test_a_number_is_finite(name, value):
    with pytest.raises(ValidationError, match=name):
        TrainFields(**{name: value})


@pytest.mark.parametrize("kind", [TrainFields, EvaluateFields, Rea2SegFields])
@pytest.mark.parametrize("model, limit", [("embedded", 192), ("Qwen/Qwen2.5-VL-7B-Instruct", 1024)])
def test_the_length_of_an_answer_follows_the_model(kind, model, limit):
    assert kind(model=model).max_new_tokens == limit
    assert kind(model=model, max_new_tokens=0).max_new_tokens == limit
    assert kind(model=model, max_new_tokens=77).max_new_tokens == 77


def test_names_known_at_once_are_those_of_the_recipes():
    code = "from dr2seg_lib.core.parameters import RECIPE_NAMES; from dr2seg_lib.methods.registry import METHODS; print(set(RECIPE_NAMES) == set(METHODS))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(recipe="dr3seg"), "use one of visionreasoner"),
        (dict(model="embeded"), "use embedded, a local folder"),
        (dict(data="coco"), "data: coco does not exist"),
        (dict(eval_data="coco"), "eval_data: coco does not exist"),
    ],
)
def test_unknown_names_are_told(wrong, says):
    assert says in find_unknown_name(TrainFields(**wrong))
