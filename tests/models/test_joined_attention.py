"Attention over a tree against one softmax over all keys of each query, in double precision."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dr2seg_lib.models.joined_attention import (
    FUSED,
    WRITTEN_OUT,
    JoinedAttention,
    choose_kernels,
    make_part,
)

BOTH = pytest.mark.parametrize("kernels", [FUSED, WRITTEN_OUT], ids=["fused", "written out"])
D = 4  # numbers of a head


def trees():
    "Tokens of each leaf; of each level above, the nodes' lengths and the owner of each leaf."
    lengths = st.lists(st.integers(1, 5), min_size=1, max_size=3)

    def with_owners(case):
        leaves, levels = case
        owned = [
            st.tuples(
                st.just(nodes),
                st.lists(
                    st.integers(0, len(nodes) - 1), min_size=len(leaves), max_size=len(leaves)
                ),
            )
            for nodes in levels
        ]
        return st.tuples(st.just(leaves), st.tuples(*owned))

    leaves = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)
    return st.tuples(leaves, st.lists(lengths, min_size=1, max_size=3)).flatmap(with_owners)


def drawn(tree, heads, group, seed, spoilt=0.0):
    "Queries, new keys and values, and those of each level; `spoilt` stands where padding is."
    (leaves, levels), generator = tree, torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, D, generator=generator, dtype=torch.float64)

    N = sum(leaves)
    tensors = [normal(N, heads * group), normal(N, heads), normal(N, heads)]
    for nodes, _ in levels:
        padding = torch.arange(max(nodes)) >= torch.tensor(nodes)[:, None]
        for _ in "kv":
            x = normal(len(nodes), heads, max(nodes))
            tensors.append(x.masked_fill(padding[:, None, :, None], spoilt))
    return [x.requires_grad_() for x in tensors]


def joined(tree, tensors, kernels, scale=0.5):
    leaves, levels = tree
    segments = np.repeat(np.arange(len(leaves)), leaves)
    parts = [
        make_part(np.array(owners)[segments], nodes, dtype=torch.float64, width=max(nodes))
        for nodes, owners in levels
    ]
    own = make_part(segments, leaves, dtype=torch.float64)
    return JoinedAttention.apply(*tensors[:3], scale, kernels, own, parts, *tensors[3:])


def oracle(tree, tensors, scale=0.5):
    "Each query alone: the keys it sees, one after the other, and a softmax over them."
    (leaves, levels), (q, k, v, *above) = tree, tensors
    group, outs, first = q.shape[1] // k.shape[1], [], 0
    for leaf, length in enumerate(leaves):
        seen = [
            (above[2 * i][owners[leaf], :, :n], above[2 * i + 1][owners[leaf], :, :n])
            for i, (nodes, owners) in enumerate(levels)
            for n in [nodes[owners[leaf]]]
        ]
        for place in range(first, first + length):
            new = [x[first : place + 1].transpose(0, 1) for x in (k, v)]
            keys, values = (
                torch.cat(pair, 1).repeat_interleave(group, 0) for pair in zip(*seen, new)
            )
            p = (keys @ q[place][..., None] * scale)[..., 0].softmax(-1)
            outs.append((p[:, None] @ values)[:, 0])
        first += length
    return torch.stack(outs)


def gradients(out, tensors, weights):
    return torch.autograd.grad((out * weights).sum(), tensors, retain_graph=True)


@BOTH
@given(trees(), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]), st.integers(0, 99))
@settings(max_examples=150)
def test_one_softmax_over_all_that_a_query_sees(kernels, tree, heads, group, seed):
    tensors = drawn(tree, heads, group, seed)
    out, expected = joined(tree, tensors, kernels), oracle(tree, tensors)
    assert (out - expected).abs().max() < 1e-12
    weights = torch.randn_like(expected)
    ours, theirs = (gradients(x, tensors, weights) for x in (out, expected))
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(ours, theirs))


@BOTH
@given(trees(), st.integers(0, 99))
@settings(max_examples=60)
def test_padded_keys_never_leak(kernels, tree, seed):
    "The columns behind a node's keys hold huge numbers; nothing changes, to the last bit."
    clean, spoilt = (drawn(tree, 2, 2, seed, x) for x in (0.0, 1e30))
    out = joined(tree, clean, kernels)
    assert torch.equal(joined(tree, spoilt, kernels), out)
    weights = torch.randn_like(out)
    ours = gradients(joined(tree, spoilt, kernels), spoilt, weights)
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(out, clean, weights)))
    for grad, (nodes, _) in zip(ours[3::2], tree[1]):
        padding = torch.arange(max(nodes)) >= torch.tensor(nodes)[:, None]
        assert not grad.transpose(1, 2)[padding].any()


@BOTH
def test_padded_queries_never_leak(kernels):
    "The first query stands at every empty place; were it read there, a node would show it."
    tree = ((1, 4, 0, 2), ((([3, 5]), (0, 1, 1, 1)), (([2, 4, 1]), (0, 1, 1, 2))))
    tensors, huge = drawn(tree, 2, 2, 0), 1e8
    weights = torch.ones(7, 4, D, dtype=torch.float64)
    with torch.no_grad():
        for x in (*tensors[:3], weights):
            x[0] *= huge
    ours, theirs = (
        gradients(x, tensors, weights)
        for x in (joined(tree, tensors, kernels), oracle(tree, tensors))
    )
    for a, b in zip(ours[:3], theirs[:3]):
        assert (a[1:] - b[1:]).abs().max() < 1e-11
    for a, b in zip(ours[3:], theirs[3:]):
        assert (a[1:] - b[1:]).abs().max() < 1e-11


@BOTH
def test_gradients_are_the_slopes(kernels):
    tree = ((2, 0, 1), (([2, 3], (1, 0, 1)),))
    tensors = drawn(tree, 1, 2, 3)
    assert torch.autograd.gradcheck(lambda *x: joined(tree, x, kernels), tensors)


@BOTH
@given(trees(), st.integers(0, 99))
@settings(max_examples=40)
def test_single_precision_is_off_by_rounding_alone(kernels, tree, seed):
    tensors = drawn(tree, 2, 2, seed)
    singles = [x.detach().float().requires_grad_() for x in tensors]
    leaves, levels = tree
    segments = np.repeat(np.arange(len(leaves)), leaves)
    parts = [make_part(np.array(o)[segments], n, width=max(n)) for n, o in levels]
    own = make_part(segments, leaves)
    out = JoinedAttention.apply(*singles[:3], 0.5, kernels, own, parts, *singles[3:])
    expected = oracle(tree, tensors)
    assert out.dtype == torch.float32
    assert (out - expected).abs().max() < 1e-5
    weights = torch.randn_like(expected)
    ours = gradients(out, singles, weights.float())
    theirs = gradients(expected, tensors, weights)
    assert all((a - b).norm() <= 1e-5 * max(1, b.norm()) for a, b in zip(ours, theirs))


def test_the_fused_kernels_are_chosen_where_there_are_any():
    q = torch.zeros(1)
    assert choose_kernels(q) is FUSED
    assert choose_kernels(q, written_out=True) is WRITTEN_OUT
    assert choose_kernels(q.to("meta")) is WRITTEN_OUT
