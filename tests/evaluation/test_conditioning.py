"How long the answers may be whose entropy is measured."

from types import SimpleNamespace

import pytest

from dr2seg_lib.core.parameters import EvaluateConfig
from dr2seg_lib.evaluation import conditioning
from dr2seg_lib.models.requirements import EMBEDDED


@pytest.fixture
def limits(monkeypatch):
    "The limits with which rollouts are asked for; none is generated."
    asked = []

    def no_rollouts(policy, samples, prompt, second, n, max_new_tokens, seed):
        asked.append(max_new_tokens)
        return SimpleNamespace(groups=[])

    monkeypatch.setattr(conditioning, "generate_rollouts", no_rollouts)
    return asked


@pytest.mark.parametrize(
    "source, model", [(EMBEDDED, "embedded"), ("Qwen/Qwen2.5-VL-7B-Instruct",) * 2], ids=str
)
def test_the_limit_is_that_of_an_evaluation(limits, source, model):
    policy = SimpleNamespace(model=SimpleNamespace(name_or_path=str(source)))
    conditioning.conditional_entropies(policy, [], None, None)
    expected = EvaluateConfig(model=model, max_new_tokens=0).rollout.max_new_tokens
    assert limits == [expected, expected]


def test_a_limit_that_is_given_holds(limits):
    conditioning.conditional_entropies(None, [], None, None, max_new_tokens=60)
    assert limits == [60, 60]
