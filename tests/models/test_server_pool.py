"Several servers as one: nothing that is sampled depends on which of them answers."

import pytest
import torch
from safetensors.torch import load_file
from vllm_engine import Engine

from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.vllm_client import ServedPolicy
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.training.config import TrainConfig, check_training
from dr2seg_lib.training.trainer import train

POLICY = Policy.load()
SAMPLES = [MiniReasonSeg("val")[i] for i in range(4)]
TEXTS = [dr2seg_prompt(s.query) for s in SAMPLES]
CLOSED = "http://127.0.0.1:9"


@pytest.fixture
def engines(monkeypatch):
    "Two servers of the same policy; a third may be started on the port of a dead one."
    monkeypatch.setattr("dr2seg_lib.models.http_client.RETRY_WAITS", (0.01, 0.02, 0.03))
    started = [Engine(POLICY), Engine(POLICY)]
    yield started
    for engine in started:
        if not engine.dead:
            engine.stop()


def sampled(served, samples=SAMPLES, texts=TEXTS):
    with torch.no_grad():
        prefix = served.prefill(texts, served.encode([s.image for s in samples]))
        return served.generate(prefix, 2, 12, 1.0, list(range(2 * len(texts))))


def same(a, b):
    return torch.equal(a.ids * a.mask, b.ids * b.mask) and torch.equal(a.mask, b.mask)


def test_questions_are_shared_and_answers_are_those_of_one(engines, tmp_path):
    one, two = engines
    local = sampled(POLICY)
    served = ServedPolicy(POLICY, f"{one.url}, {two.url}/v1", "embedded", tmp_path)
    assert same(sampled(served), local)
    assert one.chats() == two.chats() == 2
    other = ServedPolicy(POLICY, f"{one.url},{two.url}", "embedded", tmp_path, process=1)
    sampled(other, SAMPLES[:1], TEXTS[:1])
    assert two.chats() == 3, "another process begins with another server"


def test_questions_about_a_picture_stay_where_it_was_seen(engines, tmp_path):
    one, two = engines
    served = ServedPolicy(POLICY, f"{one.url},{two.url}", "embedded", tmp_path)
    sampled(served, SAMPLES[:2], TEXTS[:2])
    seen = [set(e.pictures) for e in engines]
    samples = [SAMPLES[1], SAMPLES[0], SAMPLES[1], SAMPLES[0]]
    sampled(served, samples, TEXTS)
    assert [set(e.pictures) for e in engines] == seen


def timeless(run):
    rows = [dict(row) for row in run.metrics()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows]


def weights(run):
    return load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors"))


SHORT = dict(norm_lr=0, steps=3, prompts=4, samples=2, rank=4, alpha=4, lr=1e-2, max_new_tokens=16)


@pytest.mark.slow
def test_a_server_dies_in_the_middle_of_a_step_and_comes_back(
    engines, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr("dr2seg_lib.models.server_pool.RETRY_SILENT", 0)
    one, two = engines
    config = TrainConfig(server=one.url, eval_samples=0, **SHORT)
    whole = train(config, tmp_path / "whole")
    two.dies_at = 2  # its second question of the first step, while its first is under way
    log = Run.log

    def log_and_start_again(self, row):
        log(self, row)
        if row["step"] == 2:
            engines.append(Engine(POLICY, two.server_port))

    monkeypatch.setattr(Run, "log", log_and_start_again)
    capfd.readouterr()
    both = config.model_copy(
        update=dict(runtime=config.runtime.model_copy(update=dict(server=f"{one.url},{two.url}")))
    )
    run = train(both, tmp_path / "run")
    assert run.status == "done"
    assert two.dead
    assert two.chats() == 2
    assert timeless(run) == timeless(whole)
    assert read_jsonl(run.folder / "rollouts.jsonl") == read_jsonl(whole.folder / "rollouts.jsonl")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(run)[name], tensor)
    back = engines[2]
    paths = [path for path, _ in back.log]
    assert paths[0] == "/v1/load_lora_adapter"
    assert back.chats() >= 2, "and it is asked again"
    assert set(back.policies) == set(one.policies) == {"policy"}, "all let go of the adapter"
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("dr2seg: ")]
    assert len(said) == 2
    assert f"server: {two.url} does not answer" in said[0]
    assert said[0].endswith("the other servers are asked meanwhile")
    assert said[1] == f"dr2seg: server: {two.url} answers again"


def test_one_that_is_dead_at_the_start_and_all_of_them(engines, tmp_path, capfd):
    one, two = engines
    settings = dict(eval_samples=0, norm_lr=0)
    check_training(TrainConfig(server=f"{CLOSED},{one.url}", **settings))
    served = ServedPolicy(POLICY, f"{CLOSED},{one.url}", "embedded", tmp_path)
    assert same(sampled(served), sampled(POLICY))
    assert one.chats() == 4
    assert capfd.readouterr().err.count(f"dr2seg: server: {CLOSED} does not answer") == 1
    nobody = rf"^server: none of 2 servers answers; {CLOSED}1 does not answer \(.*refused\); start"
    with pytest.raises(ValueError, match=nobody):
        check_training(TrainConfig(server=f"{CLOSED},{CLOSED}1", **settings))
    two.root = "/models/other"
    with pytest.raises(ValueError, match=f"server: {two.url} has policy, not embedded"):
        check_training(TrainConfig(server=f"{one.url},{two.url}", **settings))
    with pytest.raises(ValueError, match="server:  is no address"):
        check_training(TrainConfig(server=f"{one.url},", **settings))
    one.die()
    with pytest.raises(ValueError, match=r"^server: none of 2 servers answers; .* does not answer"):
        sampled(served)


def test_a_server_with_other_weights_is_named_among_several(engines, tmp_path):
    one, two = engines

    def off(choice):
        logprobs = [dict(t, logprob=t["logprob"] - 1.5) for t in choice["logprobs"]["content"]]
        return choice | dict(logprobs=dict(content=logprobs))

    two.change = lambda reply: reply | dict(choices=[off(c) for c in reply["choices"]])
    served = ServedPolicy(POLICY, f"{one.url},{two.url}", "embedded", tmp_path)
    with pytest.raises(
        ValueError, match=rf"^server: {two.url} answers by other weights \(its .*-1.5"
    ):
        sampled(served)


def test_a_busy_server_is_spared_and_its_questions_go_elsewhere(engines, tmp_path):
    one, two = engines
    one.troubles = [503] * 9
    served = ServedPolicy(POLICY, f"{one.url},{two.url}", "embedded", tmp_path)
    assert same(sampled(served), sampled(POLICY))
    assert one.chats() <= 2, "not asked the same twice"
    assert sampled(served).ids.shape == sampled(POLICY).ids.shape
    assert one.chats() <= 2, "and nothing else for half a minute"


@pytest.mark.slow
def test_two_processes_share_both_servers(engines, tmp_path):
    one, two = engines
    asked = SHORT | dict(server=f"{one.url},{two.url}", eval_samples=0, steps=1)
    alone = train(TrainConfig(**asked), tmp_path / "alone")
    one.log.clear(), two.log.clear()
    shared = train(TrainConfig(**asked | dict(processes=2)), tmp_path / "shared")
    (first,), (second,) = alone.metrics(), shared.metrics()
    for name in "reward", "tokens", "kl", "grad_norm", "logprob_gap", "answer_entropy":
        assert first[name] == pytest.approx(second[name], abs=1e-5)
    assert one.chats() >= 2, "half of the four questions, at least"
    assert two.chats() >= 2
    assert set(one.policies) == set(two.policies) == {"policy"}
