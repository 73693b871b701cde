"Quantised weights, moments of 8 bits, fewer pixels, models that wait: whole runs of them."

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

from dr2seg_lib.core.parameters import EvaluateConfig, TrainConfig, changed_parameters
from dr2seg_lib.core.settings import OptimSettings
from dr2seg_lib.data.samples import Target
from dr2seg_lib.evaluation.evaluate import run_evaluation
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.quantized import quantized_layers
from dr2seg_lib.runs.verify import inherit
from dr2seg_lib.segmenters.base import Segmenter
from dr2seg_lib.segmenters.loading import load_segmenter
from dr2seg_lib.training import both_ends, trainer
from dr2seg_lib.training.checkpoint_state import load_state, save_state, whole_state
from dr2seg_lib.training.trainer import build_optimizer, train
from dr2seg_lib.viewing.playground_inputs import cached_policy

SMALL = {
    "steps": 3,
    "rollout.questions_per_step": 2,
    "rollout.group_size": 3,
    "rollout.max_new_tokens": 60,
    "lora.rank": 4,
    "lora.alpha": 4,
    "evaluation.samples": 0,
    "evaluation.every": 0,
    "runtime.checkpoint_every": 1,
}
FEW = SMALL | {"model.quantize": "nf4", "optim.states": "8bit", "data.max_pixels": 96 * 96}


def timeless(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(TrainConfig(**FEW), tmp_path_factory.mktemp("few") / "run")


def test_it_trains_and_the_engine_is_the_models_own_forward(whole):
    rows = whole.metrics()
    assert rows[0]["self_check"] < 1e-4
    assert rows[0]["kl"] == 0, "the reference is the start"
    assert rows[2]["kl"] > 0, "the policy has moved"


def test_a_resumed_run_ends_as_an_unbroken_one(whole, tmp_path):
    "Stopped after one step, gone on with: rows, adapter and moments to the last bit."
    config = TrainConfig(**FEW)

    def stop(self, *_):
        return len(self.metrics()) == 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(whole), "stop_requested", stop)
        train(config, tmp_path / "run")
    run = train(config, tmp_path / "run", resume=True)
    assert [*map(timeless, run.metrics())] == [*map(timeless, whole.metrics())]
    last = "checkpoints/step-000003"
    ours, theirs = (load_file(r.folder / last / "adapter_model.safetensors") for r in (run, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    ours, theirs = (
        torch.load(r.folder / last / "optimizer.pt", weights_only=True) for r in (run, whole)
    )
    pairs = zip(tree_leaves(ours["state"]), tree_leaves(theirs["state"]), strict=True)
    assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs)


def test_the_model_card_says_how_the_weights_were_stored(whole):
    card = (whole.folder / "checkpoints/step-000003/README.md").read_text()
    assert "its frozen layers in nf4, by bitsandbytes" in card


def test_an_evaluation_of_its_checkpoint_is_told_all_that(whole, tmp_path):
    adapter = str(whole.folder / "checkpoints/step-000003")
    found, sentence = inherit({"model.adapter": adapter, "data.samples": 2})
    config = EvaluateConfig(**found)
    assert config.model.quantize == "nf4"
    assert config.data.max_pixels == 96 * 96
    assert "model.quantize nf4" in sentence
    rows = run_evaluation(config, tmp_path / "val")
    assert rows.folder.joinpath("results.json").is_file()


def test_a_viewer_loads_it_as_the_run_had_it(whole):
    policy = cached_policy(whole.folder)
    assert len(quantized_layers(policy.model)) == 28
    assert policy.frame == 96


def test_moments_of_another_kind_cannot_be_gone_on_with():
    recorded = TrainConfig(**FEW)
    with pytest.raises(ValueError, match="started with optim.states = '8bit'"):
        changed_parameters(
            recorded.model_dump(mode="json"), TrainConfig(**FEW | {"optim.states": "float32"})
        )


# --- moments of 8 bits


def trained(states: str, steps: int):
    "A policy and its optimizer after some steps on gradients that are the same for all."
    torch.manual_seed(0)
    policy = Policy.load().add_lora(16, 16)
    optimizer = build_optimizer(policy, OptimSettings(states=states, norm_lr=0))
    return policy, step(policy, optimizer, 0, steps)


def step(policy, optimizer, first: int, last: int):
    for i in range(first, last):
        draw = torch.Generator().manual_seed(i)
        for _, p in policy.trainable():
            p.grad = torch.randn(p.shape, generator=draw) * 1e-3 + 1e-3
        optimizer.step()
    return optimizer


def test_moments_take_a_quarter_and_steps_are_nearly_the_same():
    (a, plain), (b, few) = trained("float32", 5), trained("8bit", 5)
    sizes = []
    for optimizer in plain, few:
        tensors = {
            id(x): x.nbytes
            for moments in optimizer.state.values()
            for x in moments.values()
            if torch.is_tensor(x)
        }
        sizes.append(sum(tensors.values()))
    assert sizes[1] < 0.28 * sizes[0]
    start = dict(Policy.load().add_lora(16, 16).trainable())
    for (name, p), (_, q) in zip(a.trainable(), b.trainable(), strict=True):
        if "lora_B" in name:  # begins at zero
            assert (p - q).norm() < 0.05 * (p - start[name]).norm()


def test_moments_of_8_bits_are_gone_on_with_exactly(tmp_path):
    whole, _ = trained("8bit", 4)
    half, optimizer = trained("8bit", 2)
    save_state(half, whole_state(half, optimizer), tmp_path)
    again = Policy.load().add_lora(16, 16)
    fresh = build_optimizer(again, OptimSettings(states="8bit", norm_lr=0))
    load_state(again, fresh, tmp_path)
    step(again, fresh, 2, 4)
    for (_, p), (_, q) in zip(whole.trainable(), again.trainable(), strict=True):
        assert torch.equal(p, q)


# --- models that wait on the CPU


class Network(nn.Linear):
    "A network that writes down where it is sent."

    def __init__(self, events):
        super().__init__(1, 1)
        self.events = events

    def to(self, place):
        self.events.append(f"to {place}")
        return self


class Drawer(Segmenter):
    "A segmenter that draws nothing, and writes down when."

    def __init__(self, events):
        self.events, self.moved = events, Network(events)

    def network(self):
        return self.moved

    def masks(self, image, prompts):
        self.events.append("draw")
        return [np.zeros(image.shape[:2], bool) for _ in prompts]


@pytest.mark.parametrize("offload", [True, False])
def test_the_segmenter_is_on_its_device_while_it_draws_alone(tmp_path, monkeypatch, offload):
    events = []
    drawer = Drawer(events)
    drawer.home = torch.device("meta") if offload else None  # there is no GPU here
    generate = Policy.generate

    def answer(self, *args, **options):
        events.append("answer")
        return generate(self, *args, **options)

    monkeypatch.setattr(Policy, "generate", answer)
    monkeypatch.setattr(both_ends, "load_segmenter", lambda name: drawer)
    values = {"steps": 1, "evaluation.samples": 3, "runtime.offload": offload}
    train(TrainConfig(**SMALL | {"method": "visionreasoner"} | values), tmp_path / "run")
    if not offload:
        assert {e for e in events if e.startswith("to ")} == set()
        return
    where = "cpu"
    for event in events:
        where = event.removeprefix("to ") if event.startswith("to ") else where
        assert event != "answer" or where == "cpu"
        assert event != "draw" or where == "meta"
    assert events.count("to meta") == 2, "before and after training"
    assert where == "cpu"


def test_a_scorer_is_moved_for_the_rewards_of_a_step(tmp_path, monkeypatch):
    scorer, events = trainer.cached_scorer("embedded"), []
    monkeypatch.setattr(scorer, "home", torch.device("cpu"))
    monkeypatch.setattr(scorer, "cache", {})  # other tests of this process may have filled it

    def noted(owner, name, event):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda x: (events.append(event), plain(x))[1])

    noted(scorer.model, "to", "to")
    noted(scorer, "encode_images", "pictures")
    noted(scorer, "encode_texts", "captions")
    values = {"steps": 1, "method": "dpad", "runtime.offload": True}
    whole_answers = {"rollout.max_new_tokens": 240}  # a caption comes last
    train(TrainConfig(**SMALL | values | whole_answers), tmp_path / "run")
    assert events[0] == "to", "to the CPU when it was loaded"
    inside = events[1:]
    assert inside[0] == inside[-1] == "to"
    assert inside.count("to") == 2
    assert {"pictures", "captions"} <= set(inside)


def test_a_true_segmenter_draws_the_same_after_it_was_moved():
    segmenter, image = load_segmenter("embedded"), np.zeros((40, 50, 3), np.uint8)
    image[10:20, 10:30] = 255
    target = Target((10, 10, 29, 19), (20, 15))
    before = segmenter.segment(image, [target])
    segmenter.offload()
    with segmenter.in_use():
        assert (segmenter.segment(image, [target]) == before).all()
    assert segmenter.predictor._features is None, "nothing is kept on the device"
