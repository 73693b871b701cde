"Policies of both families, and answers they sampled."

import pytest
from policies import FAMILIES, make_policy

from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.methods.dr2seg import dr2seg_prompt


@pytest.fixture(scope="module", params=FAMILIES)
def policy(request):
    return make_policy(request.param)


@pytest.fixture(scope="module")
def batch(policy):
    "Prompts of unequal length on several images, and four sampled answers to each."
    samples = [MiniReasonSeg("val")[i] for i in range(3)]
    texts = [dr2seg_prompt(s.query) for s in samples]
    encoded = policy.encode([s.image for s in samples])
    assert len({len(policy.tokenizer(t)["input_ids"]) for t in texts}) > 1
    for policy.seed in range(
        50
    ):  # random weights may say <|image_pad|>, behind which the oracle would look for an image
        completions = policy.generate(
            policy.prefill(texts, encoded), group_size=4, max_new_tokens=24, seed=policy.seed
        )
        if (completions.ids != policy.model.config.image_token_id).all():
            return samples, texts, encoded, completions
