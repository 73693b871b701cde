"GRPO's formulas against hand-made numbers, brute force and autograd's own check."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dr2seg_lib.training.grpo import advantages, kl_k3, masked_mean, policy_loss


def test_advantages_by_hand():
    a = advantages(torch.tensor([0.0, 0.0, 0.0, 4.0]))
    assert torch.allclose(a, torch.tensor([-0.5, -0.5, -0.5, 1.5]))  # mean 1, unbiased std 2
    assert torch.equal(advantages(torch.tensor([0.0, 4.0]), "none"), torch.tensor([-2.0, 2.0]))


def test_a_constant_group_teaches_nothing():
    assert (advantages(torch.full((3, 8), 6.5)) == 0).all()


def test_groups_do_not_mix():
    r = torch.rand(5, 8)
    assert torch.allclose(advantages(r)[2], advantages(r[2]))


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match="advantage_scale"):
        advantages(torch.rand(4), "batch")


@given(st.lists(st.floats(0, 8, width=32), min_size=2, max_size=16))
def test_advantages_sum_to_zero(rewards):
    assert abs(advantages(torch.tensor(rewards, dtype=torch.double)).sum()) < 1e-6


def test_policy_loss_gradient_check():
    torch.manual_seed(0)
    logp = torch.randn(4, 5, dtype=torch.double).requires_grad_()
    old, A = (
        logp.detach() + 0.5 * torch.randn(4, 5, dtype=torch.double),
        torch.randn(4, dtype=torch.double),
    )
    mask = torch.rand(4, 5) > 0.3
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, old, A, mask), logp)
    assert torch.autograd.gradcheck(lambda x: masked_mean(kl_k3(x, old), mask), logp)


def test_clipping_by_hand():
    on = torch.ones(1, 1, dtype=torch.bool)

    def ratio(r):
        return torch.tensor([[r]], dtype=torch.double).log()

    def loss(r, A):
        return policy_loss(ratio(r), ratio(1.0), torch.tensor([A], dtype=torch.double), on).item()

    assert loss(1.5, 1.0) == pytest.approx(-1.2)
    assert loss(0.5, 1.0) == pytest.approx(-0.5)  # no more gain above 1 + clip
    assert loss(0.5, -1.0) == pytest.approx(0.8)
    assert loss(1.5, -1.0) == pytest.approx(1.5)  # no more gain below 1 - clip


def test_on_policy_gradient_is_plain_policy_gradient():
    logp, A = torch.randn(3, 4, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    got = torch.autograd.grad(policy_loss(logp, logp.detach(), A, mask), logp)[0]
    assert torch.allclose(got, -A[:, None] * mask / 7)


@given(st.lists(st.tuples(st.floats(-9, 0), st.floats(-9, 0)), min_size=1, max_size=9))
def test_k3_is_never_negative_and_zero_where_equal(pairs):
    p, q = torch.tensor(pairs, dtype=torch.double).T
    assert (kl_k3(p, q) >= -1e-12).all()
    assert (kl_k3(p, p) == 0).all()
