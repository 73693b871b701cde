"Every published training rehearses: true widths, one layer, few and small questions."

import pytest

from dr2seg_lib.core.presets import published_presets
from dr2seg_lib.rehearsal.answers import AnswerLengths
from dr2seg_lib.rehearsal.plan import PlanRequest, plan_config, plan_training

SMALL = {
    "rollout.group_size": 2,
    "rollout.max_new_tokens": 40,
    "evaluation.samples": 2,
}


@pytest.mark.parametrize("preset", published_presets())
def test_a_preset_rehearses(preset):
    full = preset == "full_tuning"
    name, processes = ("dr2seg_7k+full_tuning", 8) if full else (preset, 1)
    given = SMALL | {"rollout.questions_per_step": 2 * processes}
    config = plan_config(name, given, processes)
    lengths = AnswerLengths(32, 4)
    request = PlanRequest(gpus=processes, lengths=lengths, depth=1, side=112)
    plan = plan_training(config, request, search=False)
    stages = {row["stage"]: row for row in plan["stages"]}
    assert plan["fits"]
    assert plan["hours"] > 0
    for stage in "first", "reference", "update", "evaluation":
        assert stages[stage]["tflop"] > 0
        assert stages[stage]["holds_gib"]["weights"] > 0
    assert (stages.get("second", {}).get("tflop", 0) > 0) == (
        "dr2seg" in name or name == "embedded"
    )
    assert stages["checkpoint"]["holds_gib"]["optimizer"] > 0
