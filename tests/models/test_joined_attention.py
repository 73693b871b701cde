"Attention over a tree against one softmax over all keys of each query, in double precision."

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dr2seg_lib.models import joined_attention
from dr2seg_lib.models.joined_attention import (
    EFFICIENT,
    FUSED,
    WRITTEN_OUT,
    JoinedAttention,
    attend_both_ways,
    choose_kernels,
    make_part,
    proven,
)

KINDS = dict(fused=FUSED, efficient=EFFICIENT, written_out=WRITTEN_OUT)
ALL = pytest.mark.parametrize("kernels", KINDS.values(), ids=KINDS)
D = 4  # numbers of a head


def check_demands(q, k, bias):
    "What CUTLASS asks of the tensors that torch hands to it."
    if bias is not None:
        assert bias.shape == (*q.shape[:3], k.shape[2]) and bias.dtype == q.dtype
        assert bias.stride(3) == 1 and not any(n % 16 for n in bias.stride()[:3])
    assert q.stride(3) == k.stride(3) == 1


def efficient_on_cpu(q, k, v, bias, sums, dropout=0.0, causal=False, *, scale=None):
    "torch's operator for the GPU by autograd's own softmax: its arguments, its padded result."
    check_demands(q, k, bias)
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -q.shape[2] % 32), value=torch.inf)
    return scores.softmax(-1) @ v, lse, *torch.zeros(2, dtype=torch.long).unbind()


def efficient_backward_on_cpu(
    grad, q, k, v, bias, out, lse, seed, offset, dropout, wanted, causal=False, *, scale=None
):
    "As the kernel does: probabilities from the log-sum-exp it is given, of all its rows."
    check_demands(q, k, bias)
    assert lse.shape[2] % 32 == 0 and lse.is_contiguous() and wanted == [True, True, True, False]
    assert lse[..., q.shape[2] :].isinf().all()
    scores = q @ k.mT * scale + (0 if bias is None else bias)
    p = (scores - lse[..., : q.shape[2], None]).exp()
    p = p.tril() if causal else p
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    return ds @ k, ds.mT @ q, p.mT @ grad, None


@pytest.fixture(autouse=True, scope="module")
def operators_of_a_gpu():
    "The two operators behind EFFICIENT, for the CPU, so that every line of ours is run."
    name = "_scaled_dot_product_efficient_attention"
    with torch.library._scoped_library("aten", "IMPL", "CPU") as library:
        library.impl(name, efficient_on_cpu)
        library.impl(f"{name}_backward", efficient_backward_on_cpu)
        yield


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


@ALL
@given(trees(), st.sampled_from([1, 2]), st.sampled_from([1, 2, 3]), st.integers(0, 99))
@settings(max_examples=150)
def test_one_softmax_over_all_that_a_query_sees(kernels, tree, heads, group, seed):
    tensors = drawn(tree, heads, group, seed)
    out, expected = joined(tree, tensors, kernels), oracle(tree, tensors)
    assert (out - expected).abs().max() < 1e-12
    weights = torch.randn_like(expected)
    ours, theirs = (gradients(x, tensors, weights) for x in (out, expected))
    assert all((a - b).abs().max() < 1e-11 for a, b in zip(ours, theirs))


@ALL
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


@ALL
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


@ALL
def test_gradients_are_the_slopes(kernels):
    tree = ((2, 0, 1), (([2, 3], (1, 0, 1)),))
    tensors = drawn(tree, 1, 2, 3)
    assert torch.autograd.gradcheck(lambda *x: joined(tree, x, kernels), tensors)


@ALL
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
    assert choose_kernels(q) == FUSED
    assert choose_kernels(q, written_out=True) == WRITTEN_OUT
    assert choose_kernels(q.to("meta")) == WRITTEN_OUT


@pytest.fixture
def other_kernels_on_cpu(monkeypatch):
    "Puts a pair of kernels where a device's own stand."

    def place(kernels):
        monkeypatch.setitem(joined_attention.KERNELS, "cpu", kernels)

    return place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [4, 64, 128])
def test_kernels_that_hold_their_promise_are_taken(other_kernels_on_cpu, dtype, size):
    for kernels in KINDS.values():
        other_kernels_on_cpu(kernels)
        assert choose_kernels(torch.zeros(3, size, dtype=dtype)) == kernels


def in_base_two(q, *rest):
    "Log-sum-exps as some kernels give them: by powers of two."
    out, lse = FUSED[0](q, *rest)
    return out, lse / np.log(2)


def gradients_of_the_part_alone(grad, q, k, v, out, lse, mask, causal, scale):
    "As a kernel would that works out its own sums again."
    return FUSED[1](grad, q, k, v, *FUSED[0](q, k, v, mask, causal, scale), mask, causal, scale)


def without_a_number(*given):
    out, lse = FUSED[0](*given)
    return out, torch.full_like(lse, torch.nan)


def gone(*_):
    raise RuntimeError("no kernel image is available. Compile with TORCH_USE_CUDA_DSA\nat 0x7f")


@pytest.mark.parametrize(
    "kernels, reason",
    [
        ((in_base_two, FUSED[1]), "it differs by"),
        ((FUSED[0], gradients_of_the_part_alone), "it differs by"),
        ((without_a_number, FUSED[1]), "it differs by nan"),
        ((gone, gone), "no kernel image is available"),
    ],
)
def test_kernels_that_fail_or_differ_are_not_used(other_kernels_on_cpu, caplog, kernels, reason):
    other_kernels_on_cpu(kernels)
    q = torch.zeros(3, 16)
    assert choose_kernels(q) == choose_kernels(q) == WRITTEN_OUT
    (said,) = caplog.messages  # once, not at every call
    assert kernels[0].__name__ in said and reason in said and "0x7f" not in said


def test_the_small_case_has_padding_a_diagonal_and_two_parts():
    out, lse, dq, dk, dv, *others = attend_both_ways(WRITTEN_OUT, "cpu", torch.float64, 8)
    assert out.shape == (2, 3, 5, 8) and lse.shape == (2, 3, 5)
    assert dq.abs().amin() > 0 and len(others) == 3
    assert not dk[1, :, 3:].any() and not dv[1, :, 3:].any() and dk[0].abs().amin() > 0
    assert proven(WRITTEN_OUT, torch.device("cpu"), torch.float64, 8)
