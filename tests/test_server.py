"A small server that speaks vLLM's protocol and really generates, and the policy that asks it."
import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from dr2seg_lib import cli, dialogue, server
from dr2seg_lib.evaluation import EvaluateConfig, run_evaluation
from dr2seg_lib.policy import EMBEDDED, Policy
from dr2seg_lib.rollout import responses, roll_out
from dr2seg_lib.runs import Run, latest_checkpoint, read_jsonl
from dr2seg_lib.scenes import MiniReasonSeg
from dr2seg_lib.server import ServedPolicy, mismatch
from dr2seg_lib.training import TrainConfig, train


class Refusal(Exception):
    def __init__(self, code, message): self.code, self.message = code, message


class Engine(ThreadingHTTPServer):
    "The embedded policy behind the protocol; each adapter it is told to load is a policy of its own."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}", threading.Lock()
        self.policies, self.base = {"policy": Policy.load()}, "policy"
        self.fresh()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fresh(self):
        self.root, self.log, self.troubles, self.change, self.meet = str(EMBEDDED), [], [], lambda reply: reply, None
        self.policies = {self.base: self.policies[self.base]}

    def list_models(self):
        return dict(object="list", data=[dict(id=n, object="model", root=self.root if n == self.base else "", parent=None if n == self.base else self.base) for n in self.policies])

    def load(self, body):
        name, path = body["lora_name"], Path(body["lora_path"])
        with self.lock: return self.add(name, path) # transformers loads one model at a time

    def add(self, name, path):
        if name in self.policies: raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file(): raise Refusal(404, f"No adapter found for {path}")
        if json.loads((path / "adapter_config.json").read_text())["modules_to_save"]: raise Refusal(400, "vLLM only supports modules_to_save being None.")
        self.policies[name] = Policy.load().load_adapter(path)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body):
        if body["lora_name"] not in self.policies: raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.policies[body["lora_name"]]
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def chat(self, body):
        if body["model"] not in self.policies: raise Refusal(404, f"The model `{body['model']}` does not exist.")
        if body["n"] > 1 and not body["temperature"]: raise Refusal(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        policy, (system, user) = self.policies[body["model"]], body["messages"]
        plain = dict(top_p=1, top_k=-1, min_p=0, repetition_penalty=1, ignore_eos=True, stop_token_ids=[policy.tokenizer.eos_token_id])
        assert {k: body[k] for k in plain} == plain, "the model's generation_config would have a say"
        picture, text = user["content"]
        kind, data = picture["image_url"]["url"].split(",", 1)
        assert kind == "data:image/png;base64" and body["logprobs"] and body["return_token_ids"]
        image = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        chat = policy.processor.apply_chat_template([system, dict(role="user", content=[dict(type="image"), text])], add_generation_prompt=True)
        prompt = policy.processor(text=[chat], images=[image])["input_ids"][0]
        seeds = None if body["seed"] is None else [body["seed"] + i for i in range(body["n"])]
        with self.lock, torch.no_grad():
            done = policy.generate(policy.read([text["text"]], policy.encode([image])), body["n"], body["max_completion_tokens"], body["temperature"], seeds)
        rows = [(ids[m].tolist(), logp[m].tolist()) for ids, logp, m in zip(done.ids, done.logp, done.mask)]
        choices = [dict(index=i, message=dict(role="assistant", content=policy.tokenizer.decode(ids, skip_special_tokens=True)), token_ids=ids,
                        logprobs=dict(content=[dict(token=policy.piece(t), logprob=p) for t, p in zip(ids, logp)])) for i, (ids, logp) in enumerate(rows)]
        return self.change(dict(object="chat.completion", model=body["model"], choices=choices, prompt_token_ids=list(prompt)))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def send(self, value, code=200):
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self): self.send(self.server.list_models()) if self.path == "/v1/models" else self.send("Not Found", 404)

    def do_POST(self):
        engine, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine.log.append((self.path, body.get("lora_name") or body["model"]))
        if engine.meet: engine.meet.wait()
        trouble = engine.troubles.pop(0) if engine.troubles else None
        if trouble == "cut": return self.connection.close() # no answer at all
        if trouble: return self.send(dict(error=dict(message="out of order", code=trouble)), trouble)
        does = {"/v1/chat/completions": engine.chat, "/v1/load_lora_adapter": engine.load, "/v1/unload_lora_adapter": engine.unload}[self.path]
        try: self.send(does(body))
        except Refusal as e: self.send(dict(error=dict(message=e.message, type="BadRequestError", code=e.code)), e.code)


@pytest.fixture(scope="module")
def running():
    engine = Engine()
    yield engine
    engine.shutdown()
    engine.server_close()


@pytest.fixture
def engine(running, monkeypatch):
    monkeypatch.setattr(server, "WAITS", (0.01, 0.02, 0.03))
    running.fresh()
    return running


def noisy(policy, seed=0):
    "An adapter that makes a difference."
    torch.manual_seed(seed)
    policy.add_lora(4, 4)
    for name, p in policy.trainable():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.1)
    return policy


SAMPLES = [MiniReasonSeg("val")[i] for i in range(3)]
TEXTS = [dialogue.dr2seg(s.query) for s in SAMPLES]

def answered(policy, n=1, temperature=0.0, seed=None, longest=60):
    with torch.no_grad(): return policy.generate(policy.read(TEXTS, policy.encode([s.image for s in SAMPLES])), n, longest, temperature, seed)

def same(a, b): return a.ids.shape == b.ids.shape and torch.equal(a.ids * a.mask, b.ids * b.mask) and torch.equal(a.mask, b.mask)


def test_greedy_answers_are_those_of_the_local_engine(engine, tmp_path):
    local = Policy.load()
    ours, theirs = answered(local, longest=160), answered(ServedPolicy(local, engine.url, "embedded", tmp_path), longest=160)
    assert same(ours, theirs) and (ours.ids == local.tokenizer.eos_token_id).any()
    for name in "logp", "entropy", "margin": assert ((getattr(ours, name) - getattr(theirs, name)) * ours.mask).abs().max() < 1e-3
    assert abs(mismatch(theirs)) < 1e-5 and ((theirs.theirs - theirs.logp) * theirs.mask).abs().max() < 1e-3
    assert [r.text for r in responses(local, ours)] == [r.text for r in responses(local, theirs)]
    assert [path for path, _ in engine.log] == ["/v1/chat/completions"] * 3


def test_sampled_answers_with_the_same_seeds_are_the_same(engine, tmp_path):
    local = Policy.load()
    seeds = [100, 101, 102, 200, 201, 202, 300, 301, 302]
    served = ServedPolicy(local, engine.url + "/v1/", "embedded", tmp_path)
    sampled = answered(served, 3, 1.0, seeds)
    assert same(answered(local, 3, 1.0, seeds), sampled) and len(engine.log) == 3
    assert not same(sampled, answered(served, 3, 1.0, [s + 50 for s in seeds]))
    greedy = answered(served, 2)
    assert torch.equal(greedy.ids[::2], greedy.ids[1::2])


def test_an_adapter_by_name_changes_the_answers(engine, tmp_path):
    local = noisy(Policy.load())
    with ServedPolicy(local, engine.url, "embedded", tmp_path / "served") as served:
        first = served.name
        assert first in engine.policies and first.startswith("dr2seg-") and (tmp_path / "served" / first / "adapter_model.safetensors").is_file()
        one = answered(served)
        assert same(one, answered(local)) and not same(one, answered(Policy.load())) and abs(mismatch(one)) < 1e-4
        served.publish()
        assert served.name == first, "what has not changed keeps its name"
        with torch.no_grad():
            for _, p in local.trainable(): p.mul_(-1.5)
        served.publish()
        assert served.name != first and set(engine.policies) == {"policy", served.name} and not (tmp_path / "served" / first).exists()
        assert same(answered(served), answered(local)) and not same(answered(served), one)
        with ServedPolicy(local, engine.url, "embedded", tmp_path / "other") as other: assert other.name == served.name, "two processes with the same bytes"
    assert set(engine.policies) == {"policy"} and not (tmp_path / "served").exists()
    loads = [name for path, name in engine.log if path == "/v1/load_lora_adapter"]
    assert len(loads) == 3 and len(set(loads)) == 2


def test_two_passes_and_all_requests_at_once(engine, tmp_path):
    engine.meet = threading.Barrier(2, timeout=20) # a request waits for another to be in flight
    rolled = roll_out(ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path), SAMPLES[:2], dialogue.dr2seg, None, 3, 60, seed=0)
    assert [len(g.first) for g in rolled.groups] == [3, 3] and all(len(r.entropy) == len(r.tokens) and "".join(r.tokens) == r.text for g in rolled.groups for r in g.first)
    engine.meet = None
    done = roll_out(ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path), SAMPLES[:1], dialogue.dr2seg, dialogue.vision_reasoner, 3, 160, seed=0)
    said = [r.parsed.description for r in done.groups[0].first]
    assert any(said) and [r is not None for r in done.groups[0].second] == [d is not None for d in said]
    assert len(engine.log) == 2 + 1 + len({d for d in said if d}), "one request for a description, however many gave it"


def test_training_by_a_server(engine, tmp_path):
    config = TrainConfig(server=engine.url, norm_lr=0, steps=2, prompts=2, samples=3, rank=4, alpha=4, eval_samples=2, segmenter="grabcut", max_new_tokens=60, lr=1e-2)
    run = train(config, tmp_path / "run")
    rows = run.metrics()
    assert [r["step"] for r in rows] == [1, 2] and all(abs(r["mismatch"]) < 1e-4 and r["grad_norm"] > 0 for r in rows) and "adapter" in rows[0]["seconds"]
    trained = load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors"))
    assert any(v.abs().sum() > 0 for k, v in trained.items() if "lora_B" in k)
    loads, asked = ([name for path, name in engine.log if path == p] for p in ("/v1/load_lora_adapter", "/v1/chat/completions"))
    assert len(loads) == len(set(loads)) == 3 and list(dict.fromkeys(asked)) == loads, "the start, and the adapter after each of two updates"
    assert set(engine.policies) == {"policy"} and not list(run.folder.glob("served*"))
    checkpoint = str(latest_checkpoint(run.folder))
    ways = [run_evaluation(EvaluateConfig(adapter=checkpoint, samples=3, segmenter="grabcut", max_new_tokens=60, server=s), tmp_path / f"by{i}") for i, s in enumerate(("", engine.url))]
    ours, theirs = ([r["text"] for r in read_jsonl(w.folder / "predictions.jsonl")] for w in ways)
    assert ours == theirs and len(ours) == 3


def test_a_run_whose_server_died_goes_on_when_it_is_back(engine, tmp_path, monkeypatch):
    config = TrainConfig(server=engine.url, norm_lr=0, steps=2, prompts=2, samples=3, rank=4, alpha=4, eval_samples=0, max_new_tokens=40, checkpoint_every=1)
    whole, log = train(config, tmp_path / "whole"), Run.log
    def log_and_cut(self, row):
        log(self, row)
        engine.troubles = ["cut"] * 99
    with monkeypatch.context() as m, pytest.raises(ValueError, match=f"server: {engine.url} does not answer"):
        m.setattr(Run, "log", log_and_cut)
        train(config, tmp_path / "run")
    assert Run.open(tmp_path / "run").status == "failed" and len(engine.policies) == 2, "unloading failed as well"
    engine.fresh() # started again, it knows no adapter
    resumed = train(config, tmp_path / "run", resume=True)
    timeless = lambda run: [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in run.metrics()]
    assert timeless(resumed) == timeless(whole) and len(engine.policies) == 1


def test_two_runs_do_not_take_each_other_s_adapter(engine, tmp_path):
    one, two = (ServedPolicy(noisy(Policy.load()), engine.url, "embedded", tmp_path / run / "served") for run in "ab")
    with one:
        with two: assert len(engine.policies) == 3
        answered(one, longest=2)


def test_what_passes_is_asked_again(engine, tmp_path):
    served = ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path)
    engine.troubles = ["cut", 503, 429]
    assert same(answered(served, longest=5), answered(Policy.load(), longest=5)) and len(engine.log) == 3 + 3
    engine.troubles = [503] * 30
    with pytest.raises(ValueError, match=rf"server: {engine.url} answers /v1/chat/completions with 503 \(out of order\); look into its log"): answered(served, longest=5)


def test_a_lost_reply_to_loading_does_no_harm(engine, tmp_path):
    served = ServedPolicy(noisy(Policy.load()), engine.url, "embedded", tmp_path)
    load = engine.load
    def lose(body):
        load(body)
        engine.load = load
        raise Refusal(503, "the reply got lost")
    engine.load = lose
    served.publish()
    assert served.name in engine.policies


def test_other_trouble_is_told_at_once(engine, tmp_path):
    served = ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path)
    engine.troubles = [500] * 3
    with pytest.raises(ValueError, match="with 500"): answered(served, longest=5)
    assert len(engine.log) <= 3, "no one asked twice"
    engine.troubles, engine.change = [], lambda reply: reply | dict(choices=[dict(index=0, message=dict(content="text alone"))])
    with pytest.raises(ValueError, match=f"server: {engine.url} does not answer with token ids"): answered(served, longest=5)
    off = lambda c: c | dict(logprobs=dict(content=[t | dict(logprob=t["logprob"] - 3) for t in c["logprobs"]["content"]]))
    engine.change = lambda reply: reply | dict(choices=[off(c) for c in reply["choices"]])
    with pytest.raises(ValueError, match=r"answers by other weights \(its log-probabilities are -3.0 nats off\)"): answered(served, longest=5)
    engine.change = lambda reply: reply | dict(prompt_token_ids=reply["prompt_token_ids"][:-1])
    with pytest.raises(ValueError, match=r"read a prompt of \d+ tokens that should be"): answered(served, longest=5)


def test_adapters_that_a_server_does_not_take(engine, tmp_path):
    engine.load = lambda body: (_ for _ in ()).throw(Refusal(404, "Not Found"))
    try:
        with pytest.raises(ValueError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank of 4 or more"): ServedPolicy(noisy(Policy.load()), engine.url, "embedded", tmp_path).publish()
    finally: del engine.load
    norm = Policy.load().add_lora(4, 4, norm=True)
    with pytest.raises(ValueError, match="holds more than LoRA"): ServedPolicy(norm, engine.url, "embedded", tmp_path).publish()
    norm.adapter.save_pretrained(str(tmp_path / "norm"))
    with pytest.raises(ValidationError, match="holds more than LoRA"): EvaluateConfig(server=engine.url, adapter=str(tmp_path / "norm"))
    assert all(path != "/v1/load_lora_adapter" or name.startswith("dr2seg-") for path, name in engine.log) and len(engine.log) == 1


NOWHERE = "http://127.0.0.1:9"

@pytest.mark.parametrize("settings, told", [
    (dict(server=NOWHERE), "server: vLLM takes LoRA adapters alone; use tune lora and norm_lr 0, or leave server out"),
    (dict(server=NOWHERE, norm_lr=0, tune="full"), "server: vLLM takes LoRA adapters alone"),
    (dict(server=NOWHERE, norm_lr=0), rf"server: {NOWHERE} does not answer \(.*refused\); start it, or correct the address"),
    (dict(server="localhost:8000", norm_lr=0), "server: localhost:8000 is no address; give one such as http://localhost:8000")], ids=str)
def test_a_server_that_will_not_do_is_told_before_anything_starts(settings, told):
    with pytest.raises(ValidationError, match=told): TrainConfig(eval_samples=0, **settings)


def test_another_model_is_told(engine, tmp_path, capsys):
    engine.root = "/models/other"
    with pytest.raises(ValueError, match=f"server: {engine.url} has policy, not embedded; start it by: vllm serve {EMBEDDED}"): ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path)
    capsys.readouterr() # loading
    assert cli.main(["run", "train", "-p", "norm_lr", "0", "-p", "server", engine.url, "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"dr2seg: server: {engine.url} has policy, not embedded") and len(told.splitlines()) == 1 and not (tmp_path / "run").exists()
