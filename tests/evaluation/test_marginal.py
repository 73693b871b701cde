"The entropy of an answer with its reasoning averaged out, against the long way."

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.evaluation.marginal import (
    cuts,
    entropy_over_reasoning,
    marginal_entropies,
    score_crosswise,
)
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.plain_forward import plain_logprobs
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.rollouts.two_stage import generate_rollouts

VAL = MiniReasonSeg("val")
chances = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


@pytest.fixture(scope="module")
def policy():
    return Policy.load()


@given(chances, chances)
def test_two_chains_and_three_answers_by_the_sum(a, b):
    "A world small enough to write down: p(A) is the mean of two tables."
    p = [[x / sum(row) for x in row] for row in (a, b)]
    mixed = [(x + y) / 2 for x, y in zip(*p)]
    true = -sum(x * math.log(x) for x in mixed)
    behind = [-sum(x * math.log(x) for x in row) for row in p]
    # of each chain, its answers as often as it gives them: the estimate is then the entropy
    found = -sum(
        p[k][j] / 2 * math.log((p[0][j] + p[1][j]) / 2) for k in range(2) for j in range(3)
    )
    assert found == pytest.approx(true)
    assert true >= sum(behind) / 2 - 1e-9  # what is averaged out can only take away
    columns = torch.tensor(p).log()[:, [0, 2]]  # two sampled answers
    want = -sum(math.log((p[0][j] + p[1][j]) / 2) for j in (0, 2)) / 2
    assert entropy_over_reasoning(columns) == pytest.approx(want, abs=1e-5)


def test_a_description_weighs_the_chains():
    "Chain 0 gives the description with .9, chain 1 with .1; behind them the answer has .8 and .2."
    given_it = torch.tensor([[0.9], [0.1]]).log()
    said = given_it + torch.tensor([[0.8], [0.2]]).log()
    want = -math.log((0.9 * 0.8 + 0.1 * 0.2) / (0.9 + 0.1))
    assert entropy_over_reasoning(said, given_it) == pytest.approx(want, abs=1e-6)


def test_answers_behind_other_chains_have_the_models_own_probability(policy):
    "Each crossed response is written out and scored by the model's plain forward."
    rollouts = generate_rollouts(policy, [VAL[3]], dr2seg_prompt, None, 3, 192, seed=5)
    said, given_it = score_crosswise(policy, rollouts, 0)
    responses = [r for r in rollouts.groups[0].first if cuts(r.tokens)]
    assert said.shape == (len(responses),) * 2
    ids = rollouts.completions.ids
    for k, chain in enumerate(responses):
        for j, other in enumerate(responses):
            (r, *_), (s, o, c) = cuts(chain.tokens), cuts(other.tokens)
            rows = [rollouts.groups[0].first.index(x) for x in (chain, other)]
            row = torch.cat([ids[rows[0], :r], ids[rows[1], s:c]])
            logp = plain_logprobs(
                policy,
                rollouts.texts,
                [VAL[3].image],
                row[None],
                torch.ones_like(row[None], dtype=bool),
            )
            assert float(said[k, j]) == pytest.approx(float(logp[0, r:].sum()), abs=2e-3)
            assert float(given_it[k, j]) == pytest.approx(
                float(logp[0, r : r + o - s].sum()), abs=2e-3
            )


def test_averaging_takes_no_certainty_out_of_nothing(policy):
    samples = [VAL[i] for i in range(4)]
    found = marginal_entropies(policy, samples, visionreasoner_prompt, dr2seg_prompt, n=4, seed=1)
    assert set(found) == {"I, Q", "I, Q, R", "I, Q, D", "I, Q, R, D"}
    # the own chain is one of n: at most log n nats are won by it
    assert (found["I, Q"] - found["I, Q, R"] <= math.log(4) + 1e-4).all()
    again = marginal_entropies(policy, samples, visionreasoner_prompt, dr2seg_prompt, n=4, seed=1)
    for condition in found:
        assert (found[condition] == again[condition]).all()
