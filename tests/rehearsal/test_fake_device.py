"What a fake device notices, knows and counts."

from unittest import mock

import pytest
import torch
from torch.utils._device import _device_constructors

from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.models import decoding, joined_attention, prefill, prefix_tree
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.rehearsal.answers import AnswerLengths
from dr2seg_lib.rehearsal.fake_device import FakeDevice, readable_values
from dr2seg_lib.rehearsal.sizes import fake_policy
from dr2seg_lib.rehearsal.step import rehearse_training

SMALL = TrainConfig(rollout=dict(questions_per_step=2, group_size=2, max_new_tokens=24))
SHORT = AnswerLengths(16, 4)


@pytest.fixture
def device():
    device = FakeDevice()
    with device.active():
        yield device


def test_values_follow_from_those_of_the_host(device):
    lengths = torch.tensor([3, 1, 2]).to("cuda")
    mask = torch.arange(4, device="cuda") < lengths[:, None]
    assert mask.is_cuda or mask.device.type == "cuda"
    assert mask.sum(1).tolist() == [3, 1, 2]
    assert mask.nonzero().shape == (6, 2)
    assert lengths.cpu().tolist() == [3, 1, 2]


def test_what_is_written_into_a_view_is_seen_in_the_whole(device):
    x = torch.zeros(2, 3, dtype=torch.long, device="cuda")
    x[1, :2] = 5
    assert x.tolist() == [[0, 0, 0], [5, 5, 0]]


def test_a_list_is_an_index_with_values(device):
    x = torch.arange(12).view(4, 3).to("cuda")
    assert x[[2, 0], :2].tolist() == [[6, 7], [0, 1]]
    assert x[range(1, 3)].tolist() == [[3, 4, 5], [6, 7, 8]]
    x[[0, 1], 0] = 9
    assert x[:, 0].tolist() == [9, 9, 6, 9]


def test_what_is_not_known_makes_its_place_unknown(device):
    x = torch.zeros(4, dtype=torch.long, device="cuda")
    view = x[1:]
    view[0] = torch.randn(4, device="cuda").argmax()
    assert readable_values(x) is None
    with pytest.raises(ValueError, match="depend on the weights"):
        x.tolist()


def test_truths_and_numbers_that_nobody_knows_are_those_of_a_run_that_works(device):
    x = torch.randn(4, device="cuda")
    assert bool(x.isfinite().all())
    assert x.sum().item() == 0
    assert device.work.waits["start"] == {"item": 2}


def test_a_view_costs_no_memory_and_a_freed_tensor_gives_it_back(device):
    before = device.account.now
    x = torch.empty(1000, device="cuda", dtype=torch.bfloat16)
    y = x.view(10, 100).T[3:]
    assert device.account.now - before == 2048
    del x
    assert device.account.now - before == 2048
    del y
    assert device.account.now == before


def test_the_host_works_as_ever_inside(device):
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "wrong, says",
    [
        (lambda x: x + torch.ones(4), "cuda:0 and cpu"),
        (lambda x: x.index_select(0, torch.tensor([0])), "cuda:0 and cpu"),
        (lambda x: x @ x.bfloat16(), "one type"),
        (lambda x: x @ x[:3], "reduction dim"),
    ],
)
def test_a_mistake_raises(device, wrong, says):
    with pytest.raises(RuntimeError, match=says):
        wrong(torch.ones(4, 4, device="cuda"))


def test_a_model_loaded_afterwards_is_whole():
    "Torch kept our stand-in among the makers of tensors, and weights loaded later were garbage."
    _device_constructors.cache_clear()
    with FakeDevice().active(), torch.device("cuda"):
        torch.ones(3)
    policy = Policy.load()
    base = policy.model.config.text_config.rope_parameters["rope_theta"]
    frequencies = policy.model.model.language_model.rotary_emb.inv_freq
    expected = base ** -(torch.arange(0, 2 * len(frequencies), 2) / (2 * len(frequencies)))
    assert torch.allclose(frequencies, expected)


# ---- mistakes put into the library


def test_the_step_as_it_is_has_no_mistake():
    assert rehearse_training(SMALL, SHORT).row["step"] == 1


def test_rows_left_on_the_cpu_are_noticed():
    true = joined_attention.make_part

    def forgetful(nodes, lengths, device=None, *rest):
        return true(nodes, lengths, None, *rest)

    with (
        mock.patch.object(prefix_tree, "make_part", forgetful),
        pytest.raises(RuntimeError, match="cuda:0 and cpu"),
    ):
        rehearse_training(SMALL, SHORT)


def test_a_mask_left_on_the_cpu_is_noticed():
    true = decoding.AnswerKeys.__init__

    def forgetful(self, *given):
        true(self, *given)
        self.layers = [tuple(torch.empty(x.shape) for x in pair) for pair in self.layers]

    with (
        mock.patch.object(decoding.AnswerKeys, "__init__", forgetful),
        pytest.raises(RuntimeError, match="cuda:0 and cpu|cpu and cuda:0"),
    ):
        rehearse_training(SMALL, SHORT)


def test_embeddings_of_another_type_are_noticed(device):
    true = prefill.embed_prompts

    def careless(*given):
        embeds, positions = true(*given)
        return embeds.double(), positions

    sample = MiniReasonSeg("val")[0]
    policy = fake_policy(device, "embedded", "float32")
    with (
        mock.patch.object(prefill, "embed_prompts", careless),
        pytest.raises(RuntimeError, match="one type"),
    ):
        policy.prefill([dr2seg_prompt(sample.query)], policy.encode([sample.image]))
