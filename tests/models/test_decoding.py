"Sampling on the tree against a loop that knows no caches; what a decoding step asks of a device."

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policies import FAMILIES, make_policy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models import sampling
from dr2seg_lib.models.decoding import Decoder
from dr2seg_lib.models.plain_forward import append_answers, plain_inputs
from dr2seg_lib.models.policy import Policy

SAMPLES = [MiniReasonSeg("val")[i] for i in range(2)]
TEXTS = [visionreasoner_prompt("the ring"), visionreasoner_prompt("the red ball left of the star")]
T, GROUP = 6, 3
SEEDS = list(range(2 * GROUP))


def prefilled(policy):
    return policy.prefill(TEXTS, policy.encode([s.image for s in SAMPLES]))


@pytest.fixture(scope="module", params=FAMILIES)
def speaker(request):
    "A policy that ends an answer now and then: about one token in four is the last."
    policy = make_policy(request.param)
    with torch.no_grad():
        words, logits = policy.model.get_input_embeddings().weight, prefilled(policy).logits
        hidden = torch.linalg.lstsq(words, logits.T).solution.mean(1)
        likely = logits.logsumexp(-1).mean() - 1
        words[policy.tokenizer.eos_token_id] = hidden * likely / hidden.square().sum()
    return policy


@pytest.fixture(scope="module")
def prefix(speaker):
    return prefilled(speaker)


@torch.no_grad()
def whole_forward(policy, prompt, said):
    "Logits of the next token by the model's own forward over everything."
    ids = torch.tensor([said], dtype=torch.long)
    inputs = append_answers(prompt, ids, torch.ones_like(ids))
    return policy.model(**inputs, use_cache=False).logits[0, -1].float()


def plain_loop(policy, prompt, temperature, draws, most):
    "One answer: at each token a whole forward, then the draw."
    said = []
    while len(said) < most:
        logits = whole_forward(policy, prompt, said)
        if temperature:
            reached = (logits / temperature).softmax(-1).cumsum(-1)
            token = int((reached <= draws[len(said)] * reached[-1]).sum())
        else:
            token = int(logits.argmax())
        said.append(token)
        if token == policy.tokenizer.eos_token_id:
            break
    return said


@pytest.fixture(scope="module")
def plainly(speaker):
    "Answers of the plain loop to each temperature, computed once."
    found, draws = {}, sampling.sampling_draws(SEEDS, len(SEEDS), T)
    prompts = [plain_inputs(speaker, [t], [s.image]) for t, s in zip(TEXTS, SAMPLES)]

    def answers(temperature):
        if temperature not in found:
            found[temperature] = [
                plain_loop(speaker, prompts[row // GROUP], temperature, draws[row], T)
                for row in SEEDS
            ]
        return found[temperature]

    return answers


def said(completions):
    return [ids[on].tolist() for ids, on in zip(completions.ids, completions.mask)]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_tokens_of_the_plain_loop(speaker, prefix, plainly, temperature):
    ours = speaker.generate(prefix, GROUP, T, temperature, SEEDS)
    assert said(ours) == plainly(temperature)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_the_plain_loop(family):
    policy = make_policy(family)
    prompts = [plain_inputs(policy, [t], [s.image]) for t, s in zip(TEXTS, SAMPLES)]
    plain = [plain_loop(policy, prompt, 0.0, None, T) for prompt in prompts]
    assert said(policy.generate(prefilled(policy), 1, T, 0.0)) == plain
    assert len(plain[0]) > 1


def test_the_answer_of_transformers_generate():
    "Written by others: the embedded policy, a picture whose places matter, greedy."
    policy, sample = Policy.load(), MiniReasonSeg("val")[22]
    text = dr2seg_prompt(sample.query)
    inputs = plain_inputs(policy, [text], [sample.image])
    theirs = policy.model.generate(**inputs, max_new_tokens=256, do_sample=False)
    ours = policy.generate(policy.prefill([text], policy.encode([sample.image])), 1, 256, 0.0)
    answer = theirs[0, inputs["input_ids"].shape[1] :]
    assert answer.tolist() == ours.ids[0].tolist()


def test_the_answers_are_uneven(speaker, plainly):
    "Else the tests here would hold little: some end at their first token, some never."
    lengths = {len(answer) for t in (0.7, 1.0) for answer in plainly(t)}
    assert {1, T} <= lengths


@pytest.mark.parametrize("look_every", [1, 3, 8])
@pytest.mark.parametrize("at_once", [1, 2, 3, 5, 6, 99])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_few_at_once_say_what_all_say(
    speaker, prefix, plainly, monkeypatch, at_once, look_every, temperature
):
    "However many slots there are, and however seldom who has ended is looked at."
    monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", look_every)
    ours = speaker.generate(prefix, GROUP, T, temperature, SEEDS, at_once)
    assert said(ours) == plainly(temperature)


@pytest.mark.parametrize("at_once", [0, 2])
def test_statistics_are_those_of_all_at_once(speaker, prefix, at_once):
    whole = speaker.generate(prefix, GROUP, T, 1.0, SEEDS, 0)
    ours = speaker.generate(prefix, GROUP, T, 1.0, SEEDS, at_once)
    for name in ("logp", "entropy", "margin"):
        off = getattr(ours, name) - getattr(whole, name)
        assert (off * whole.mask).abs().max() < 1e-5
    scores = speaker.logprobs(prefix, ours.ids, ours.mask)
    assert (scores - ours.logp * ours.mask).abs().max() < 1e-5


@pytest.mark.parametrize("at_once", [0, 1, 4])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_token_at_most(speaker, prefix, plainly, temperature, at_once):
    draws = SEEDS if temperature else None
    ours = speaker.generate(prefix, GROUP, 1, temperature, draws, at_once)
    assert ours.ids.shape == ours.mask.shape == (len(SEEDS), 1)
    assert ours.mask.all()
    if not temperature:
        assert said(ours) == [answer[:1] for answer in plainly(temperature)]


@pytest.mark.parametrize("at_once", [0, 1, 4])
def test_all_may_end_at_their_first_token(speaker, prefix, at_once):
    eos = speaker.tokenizer.eos_token_id
    sure = prefix.logits.clone()
    sure[:, eos] = 1e4
    ours = speaker.generate(
        type(prefix)(prefix.levels, prefix.start, sure), GROUP, T, 1.0, SEEDS, at_once
    )
    assert said(ours) == [[eos]] * len(SEEDS)


@given(
    rows=st.lists(st.integers(0, 1), min_size=1, max_size=7),
    at_once=st.integers(0, 8),
    look_every=st.integers(1, 9),
    most=st.integers(1, 9),
    seed=st.integers(0, 99),
)
@example(rows=[0, 1, 0], at_once=2, look_every=8, most=36, seed=0)
@settings(max_examples=10)
def test_slots_and_looks_never_change_an_answer(
    speaker, prefix, rows, at_once, look_every, most, seed
):
    "Also past the first block of columns: one answer after the other, or many in turns."
    index = torch.tensor(rows)
    draws = sampling.sampling_draws([seed + i for i in range(len(rows))], len(rows), most)
    ours = []
    for looks, slots in ((1, 1), (look_every, at_once)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", looks)
            tree = prefix.rows(index)
            ours.append(said(sampling.sample_rows(speaker, tree, 1.0, draws, most, slots)))
    assert ours[0] == ours[1]
    assert all(len(answer) <= most for answer in ours[0])


# what a step asks of the device

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")


class AsksNothing(TorchDispatchMode):
    "Inside, an operator whose outcome the host must know raises."

    def __init__(self):
        super().__init__()
        self.seen, self.patches = set(), pytest.MonkeyPatch()

    def __enter__(self):
        def ask(x, *args, **kwargs):
            raise AssertionError("a copy for the host waits for the device")

        for name in ("tolist", "numpy", "__array__"):  # on a CPU no operator is called for them
            self.patches.setattr(torch.Tensor, name, ask)
        return super().__enter__()

    def __exit__(self, *raised):
        self.patches.undo()
        super().__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.add(name)
        if name.startswith(WAITING) or name in ("item", "masked_scatter"):
            raise AssertionError(f"{name} asks the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise AssertionError("repeat_interleave counts on the device")
        if name.startswith(("index", "_index_put")):  # a mask as an index is counted
            places = [x for x in tree_leaves(args[1:]) if isinstance(x, torch.Tensor)]
            if places and any(x.dtype == torch.bool for x in places[:1]):
                raise AssertionError(f"{name} by a mask asks the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x),
    ],
)
def test_what_asks_is_noticed(ask):
    with pytest.raises(AssertionError, match="the device"), AsksNothing():
        ask(torch.tensor([1, 0, 2]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("slots", [2, 6])
@torch.no_grad()
def test_a_step_asks_nothing_of_the_device(speaker, prefix, slots, temperature):
    "Across a border of the blocks by which the buffers grow, some answers having ended."
    rows, most = torch.arange(2).repeat_interleave(3), 40
    decoder = Decoder(speaker.model, prefix.rows(rows), slots, most)
    record = sampling.Record(len(rows), most, speaker.tokenizer.pad_token_id, "cpu")
    draws, ended = torch.rand(len(rows), most), torch.arange(slots) == 1
    assert decoder.seat()
    with AsksNothing() as watch:
        for _ in range(35):
            places = decoder.lengths.clamp(max=most - 1)
            column = draws[decoder.rows, places][:, None] if temperature else None
            token = sampling.choose_tokens(decoder.logits, temperature, column)
            statistics = sampling.token_statistics(decoder.logits, token)
            record.write(decoder.rows, places, ~decoder.ended, token, statistics)
            decoder.step(token, ended)
    assert {"mm", "index"} & watch.seen
    assert record.completions().mask.sum(1)[decoder.rows].tolist() == [
        1 if end else 35 for end in ended
    ]


def test_the_whole_loop_looks_but_once_a_token(speaker, prefix, monkeypatch):
    "Between two looks, `sample_rows` itself asks nothing."
    looks, seat = [], Decoder.seat
    watch = AsksNothing()

    def seated(decoder):
        if looks:
            watch.__exit__(None, None, None)
        looks.append(len(decoder.rows))
        on = seat(decoder)
        if on:
            watch.__enter__()
        return on

    monkeypatch.setattr(Decoder, "seat", seated)
    monkeypatch.setitem(sampling.LOOK_EVERY, "cpu", 4)
    told = SimpleNamespace(model=speaker.model, tokenizer=speaker.tokenizer)
    rows = prefix.rows(torch.tensor([0, 1, 0]))
    sampling.sample_rows(told, rows, 0.0, None, 8, 2)
    assert len(looks) > 1
