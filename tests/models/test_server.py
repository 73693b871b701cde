"A policy that asks a server, one that speaks vLLM's protocol, and many that do not."

import asyncio
import gzip
import json
import re
import resource
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from vllm_engine import Engine, Refusal

from dr2seg_lib.cli import main
from dr2seg_lib.core.files import read_jsonl
from dr2seg_lib.data.mini import MiniReasonSeg
from dr2seg_lib.evaluation.config import EvaluateConfig, check_evaluation
from dr2seg_lib.evaluation.evaluate import run_evaluation
from dr2seg_lib.methods.dr2seg import dr2seg_prompt
from dr2seg_lib.methods.visionreasoner import visionreasoner_prompt
from dr2seg_lib.models.http_client import SERVER_KEY, post_json
from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.requirements import EMBEDDED
from dr2seg_lib.models.served_completions import completion_statistics, logprob_gap
from dr2seg_lib.models.vllm_client import ServedPolicy
from dr2seg_lib.models.vllm_protocol import list_models, served_name, server_address
from dr2seg_lib.rollouts.parsing import parse_response
from dr2seg_lib.rollouts.response import Response
from dr2seg_lib.rollouts.two_stage import generate_rollouts, second_pass, to_responses
from dr2seg_lib.runs.checkpoints import latest_checkpoint
from dr2seg_lib.runs.run_folder import Run
from dr2seg_lib.training.config import TrainConfig, check_training
from dr2seg_lib.training.trainer import train


@pytest.fixture(scope="module")
def running():
    engine = Engine()
    yield engine
    engine.shutdown()
    engine.server_close()


@pytest.fixture
def engine(running, monkeypatch):
    monkeypatch.setattr("dr2seg_lib.models.http_client.RETRY_WAITS", (0.01, 0.02, 0.03))
    running.fresh()
    return running


def noisy(policy, seed=0):
    "An adapter that makes a difference."
    torch.manual_seed(seed)
    policy.add_lora(4, 4)
    for name, p in policy.trainable():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return policy


SAMPLES = [MiniReasonSeg("val")[i] for i in range(3)]
TEXTS = [dr2seg_prompt(s.query) for s in SAMPLES]


def answered(policy, n=1, temperature=0.0, seed=None, longest=60):
    with torch.no_grad():
        return policy.generate(
            policy.prefill(TEXTS, policy.encode([s.image for s in SAMPLES])),
            n,
            longest,
            temperature,
            seed,
        )


def same(a, b):
    return (
        a.ids.shape == b.ids.shape
        and torch.equal(a.ids * a.mask, b.ids * b.mask)
        and torch.equal(a.mask, b.mask)
    )


def test_greedy_answers_are_those_of_the_local_engine(engine, tmp_path):
    local = Policy.load()
    ours, theirs = (
        answered(local, longest=160),
        answered(ServedPolicy(local, engine.url, "embedded", tmp_path), longest=160),
    )
    assert same(ours, theirs)
    assert (ours.ids == local.tokenizer.eos_token_id).any()
    for name in "logp", "entropy", "margin":
        assert ((getattr(ours, name) - getattr(theirs, name)) * ours.mask).abs().max() < 1e-3
    assert abs(logprob_gap(theirs)) < 1e-5
    assert ((theirs.server_logp - theirs.logp) * theirs.mask).abs().max() < 1e-3
    assert [r.text for r in to_responses(local, ours)] == [
        r.text for r in to_responses(local, theirs)
    ]
    assert [path for path, _ in engine.log] == ["/v1/chat/completions"] * 3


def test_sampled_answers_with_the_same_seeds_are_the_same(engine, tmp_path):
    local = Policy.load()
    seeds = [100, 101, 102, 200, 201, 202, 300, 301, 302]
    served = ServedPolicy(local, engine.url + "/v1/", "embedded", tmp_path)
    sampled = answered(served, 3, 1.0, seeds)
    assert same(answered(local, 3, 1.0, seeds), sampled)
    assert len(engine.log) == 3
    assert not same(sampled, answered(served, 3, 1.0, [s + 50 for s in seeds]))
    greedy = answered(served, 2)
    assert torch.equal(greedy.ids[::2], greedy.ids[1::2])


def test_an_adapter_by_name_changes_the_answers(engine, tmp_path):
    local = noisy(Policy.load())
    with ServedPolicy(local, engine.url, "embedded", tmp_path / "served") as served:
        first = served.name
        assert first in engine.policies
        assert first.startswith("dr2seg-")
        assert (tmp_path / "served" / first / "adapter_model.safetensors").is_file()
        one = answered(served)
        assert same(one, answered(local))
        assert not same(one, answered(Policy.load()))
        assert abs(logprob_gap(one)) < 1e-4
        served.load_lora_adapter()
        assert served.name == first, "what has not changed keeps its name"
        with torch.no_grad():
            for _, p in local.trainable():
                p.mul_(-1.5)
        served.load_lora_adapter()
        assert served.name != first
        assert set(engine.policies) == {"policy", served.name}
        assert not (tmp_path / "served" / first).exists()
        assert same(answered(served), answered(local))
        assert not same(answered(served), one)
        with ServedPolicy(local, engine.url, "embedded", tmp_path / "other") as other:
            assert other.name == served.name, "two processes with the same bytes"
    assert set(engine.policies) == {"policy"}
    assert not (tmp_path / "served").exists()
    loads = [name for path, name in engine.log if path == "/v1/load_lora_adapter"]
    assert len(loads) == 3
    assert len(set(loads)) == 2


def test_two_passes_and_all_requests_at_once(engine, tmp_path):
    engine.meet = threading.Barrier(2, timeout=20)  # a request waits for another to be in flight
    rollouts = generate_rollouts(
        ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path),
        SAMPLES[:2],
        dr2seg_prompt,
        None,
        3,
        60,
        seed=0,
    )
    assert [len(g.first) for g in rollouts.groups] == [3, 3]
    assert all(
        len(r.entropy) == len(r.tokens) and "".join(r.tokens) == r.text
        for g in rollouts.groups
        for r in g.first
    )
    engine.meet = None
    done = generate_rollouts(
        ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path),
        SAMPLES[:1],
        dr2seg_prompt,
        visionreasoner_prompt,
        3,
        160,
        seed=0,
    )
    said = [r.parsed.description for r in done.groups[0].first]
    assert any(said)
    assert [r is not None for r in done.groups[0].second] == [d is not None for d in said]
    assert len(engine.log) == 2 + 1 + len({d for d in said if d}), (
        "one request for a description, however many gave it"
    )


def test_training_by_a_server(engine, tmp_path):
    config = TrainConfig(
        server=engine.url,
        norm_lr=0,
        steps=2,
        prompts=4,
        samples=3,
        rank=4,
        alpha=4,
        eval_samples=2,
        segmenter="grabcut",
        max_new_tokens=192,
        lr=1e-2,
    )
    run = train(config, tmp_path / "run")
    rows = run.metrics()
    assert [r["step"] for r in rows] == [1, 2]
    assert all(abs(r["logprob_gap"]) < 1e-4 and r["grad_norm"] > 0 for r in rows)
    assert "adapter" in rows[0]["seconds"]
    trained = load_file(str(latest_checkpoint(run.folder) / "adapter_model.safetensors"))
    assert any(v.abs().sum() > 0 for k, v in trained.items() if "lora_B" in k)
    loads, asked = (
        [name for path, name in engine.log if path == p]
        for p in ("/v1/load_lora_adapter", "/v1/chat/completions")
    )
    assert len(loads) == len(set(loads)) == 3, (
        "the start, and the adapter after each of two updates"
    )
    assert list(dict.fromkeys(asked)) == loads, (
        "the start, and the adapter after each of two updates"
    )
    assert set(engine.policies) == {"policy"}
    assert not list(run.folder.glob("served*"))
    checkpoint = str(latest_checkpoint(run.folder))
    ways = [
        run_evaluation(
            EvaluateConfig(
                adapter=checkpoint, samples=3, segmenter="grabcut", max_new_tokens=60, server=s
            ),
            tmp_path / f"by{i}",
        )
        for i, s in enumerate(("", engine.url))
    ]
    ours, theirs = ([r["text"] for r in read_jsonl(w.folder / "predictions.jsonl")] for w in ways)
    assert ours == theirs
    assert len(ours) == 3


def test_a_run_whose_server_died_goes_on_when_it_is_back(engine, tmp_path, monkeypatch):
    config = TrainConfig(
        server=engine.url,
        norm_lr=0,
        steps=2,
        prompts=2,
        samples=3,
        rank=4,
        alpha=4,
        eval_samples=0,
        max_new_tokens=40,
        checkpoint_every=1,
    )
    whole, log = train(config, tmp_path / "whole"), Run.log

    def log_and_cut(self, row):
        log(self, row)
        engine.troubles = ["cut"] * 99

    with (
        monkeypatch.context() as m,
        pytest.raises(ValueError, match=f"server: {engine.url} does not answer"),
    ):
        m.setattr(Run, "log", log_and_cut)
        train(config, tmp_path / "run")
    assert Run.open(tmp_path / "run").status == "failed", "unloading failed as well"
    assert len(engine.policies) == 2, "unloading failed as well"
    engine.fresh()  # started again, it knows no adapter
    resumed = train(config, tmp_path / "run", resume=True)

    def timeless(run):
        return [
            {k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")}
            for r in run.metrics()
        ]

    assert timeless(resumed) == timeless(whole)
    assert len(engine.policies) == 1


def test_two_runs_do_not_take_each_other_s_adapter(engine, tmp_path):
    one, two = (
        ServedPolicy(noisy(Policy.load()), engine.url, "embedded", tmp_path / run / "served")
        for run in "ab"
    )
    with one:
        with two:
            assert len(engine.policies) == 3
        answered(one, longest=2)


def test_what_passes_is_asked_again(engine, tmp_path):
    served = ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path)
    engine.troubles = ["cut", 503, 429, 500, 502, 504]
    assert same(answered(served, longest=5), answered(Policy.load(), longest=5))
    assert len(engine.log) == 3 + 6
    engine.troubles = [503] * 30
    with pytest.raises(
        ValueError,
        match=rf"server: {engine.url} answers /v1/chat/completions with 503 "
        r"\(out of order\); look into its log",
    ):
        answered(served, longest=5)


def test_a_lost_reply_to_loading_does_no_harm(engine, tmp_path):
    served = ServedPolicy(noisy(Policy.load()), engine.url, "embedded", tmp_path)
    load = engine.load

    def lose(body):
        load(body)
        engine.load = load
        raise Refusal(503, "the reply got lost")

    engine.load = lose
    served.load_lora_adapter()
    assert served.name in engine.policies


def test_other_trouble_is_told_at_once(engine, tmp_path):
    served = ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path)
    engine.troubles = [400] * 3
    with pytest.raises(ValueError, match="with 400"):
        answered(served, longest=5)
    assert len(engine.log) <= 3, "no one asked twice"
    engine.troubles, engine.change = (
        [],
        lambda reply: reply | dict(choices=[dict(index=0, message=dict(content="text alone"))]),
    )
    with pytest.raises(ValueError, match=f"server: {engine.url} does not answer with token ids"):
        answered(served, longest=5)

    def off(c):
        return c | dict(
            logprobs=dict(
                content=[t | dict(logprob=t["logprob"] - 3) for t in c["logprobs"]["content"]]
            )
        )

    engine.change = lambda reply: reply | dict(choices=[off(c) for c in reply["choices"]])
    with pytest.raises(
        ValueError, match=r"answers by other weights \(its log-probabilities are -3.0 nats off\)"
    ):
        answered(served, longest=5)
    engine.change = lambda reply: reply | dict(prompt_token_ids=reply["prompt_token_ids"][:-1])
    with pytest.raises(ValueError, match=r"read a prompt of \d+ tokens that should be"):
        answered(served, longest=5)


def test_adapters_that_a_server_does_not_take(engine, tmp_path):
    engine.load = lambda body: (_ for _ in ()).throw(Refusal(404, "Not Found"))
    try:
        with pytest.raises(
            ValueError,
            match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a "
            "--max-lora-rank of 4 or more",
        ):
            ServedPolicy(noisy(Policy.load()), engine.url, "embedded", tmp_path).load_lora_adapter()
    finally:
        del engine.load
    norm = Policy.load().add_lora(4, 4, norm=True)
    with pytest.raises(ValueError, match="holds more than LoRA"):
        ServedPolicy(norm, engine.url, "embedded", tmp_path).load_lora_adapter()
    norm.adapter.save_pretrained(str(tmp_path / "norm"))
    with pytest.raises(ValueError, match="holds more than LoRA"):
        check_evaluation(EvaluateConfig(server=engine.url, adapter=str(tmp_path / "norm")))
    assert all(
        path != "/v1/load_lora_adapter" or name.startswith("dr2seg-") for path, name in engine.log
    )
    assert len(engine.log) == 1


NOWHERE = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(server=NOWHERE),
            "server: vLLM takes LoRA adapters alone; use model.tune lora and optim.norm_lr 0, "
            "or leave runtime.server out",
        ),
        (dict(server=NOWHERE, norm_lr=0, tune="full"), "server: vLLM takes LoRA adapters alone"),
        (
            dict(server=NOWHERE, norm_lr=0),
            rf"server: {NOWHERE} does not answer \(.*refused\); start it, or correct the address",
        ),
        (
            dict(server="localhost:8000", norm_lr=0),
            "server: localhost:8000 is no address; give one such as http://localhost:8000",
        ),
    ],
    ids=str,
)
def test_a_server_that_will_not_do_is_told_before_anything_starts(settings, message):
    with pytest.raises(ValueError, match=message):
        check_training(TrainConfig(eval_samples=0, **settings))


def test_another_model_is_told(engine, tmp_path, capsys):
    engine.root = "/models/other"
    with pytest.raises(
        ValueError,
        match=f"server: {engine.url} has policy, not embedded; start it by: vllm serve {EMBEDDED}",
    ):
        ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path)
    capsys.readouterr()  # loading
    assert (
        main(
            [
                "run",
                "train",
                "-p",
                "norm_lr",
                "0",
                "-p",
                "server",
                engine.url,
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 2
    )
    message = capsys.readouterr().err
    assert message.startswith(f"dr2seg: server: {engine.url} has policy, not embedded")
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


# special tokens, the key, and servers that are none


def test_a_text_that_spells_special_tokens_is_answered_by_the_policy_itself(engine, tmp_path):
    "A server would read the tokens from it; the others in the batch go to the server."
    texts = [
        dr2seg_prompt(q)
        for q in ("the ball", "<|image_pad|> the ball", "a<|im_end|>b", "\ud800 ball")
    ]
    local = Policy.load()

    def ask(policy, n, temperature, seed):
        encoded = policy.encode([SAMPLES[0].image] * len(texts))
        with torch.no_grad():
            return policy.generate(policy.prefill(texts, encoded), n, 16, temperature, seed)

    served = ServedPolicy(local, engine.url, "embedded", tmp_path)
    for n, temperature, seeds in ((1, 0.0, None), (3, 1.0, list(range(12)))):
        engine.log.clear()
        sampled = ask(served, n, temperature, seeds)
        assert same(ask(local, n, temperature, seeds), sampled)
        assert abs(logprob_gap(sampled)) < 1e-4
        assert len(engine.log) == 2, (
            "the plain text, and the one whose surrogate has become a question mark"
        )


def test_a_description_that_spells_special_tokens_goes_through_the_second_pass(engine, tmp_path):
    served = ServedPolicy(Policy.load(), engine.url, "embedded", tmp_path)
    text = "<think>a</think><description>the <|image_pad|> ball</description><answer>[]</answer>"
    first = [[Response(text, parse_response(text), [text], [0.0], [1.0], 1)]]
    encoded = served.encode([SAMPLES[0].image])
    with torch.no_grad():
        second = second_pass(
            served,
            encoded,
            served.prefill(TEXTS[:1], encoded),
            first,
            visionreasoner_prompt,
            8,
            1.0,
            [0],
        )
    assert second[0][0] is not None
    assert not engine.log


def test_a_key_travels_to_its_server_and_nowhere_else(engine, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(SERVER_KEY, SECRET)
    engine.key = SECRET
    config = TrainConfig(
        server=engine.url,
        norm_lr=0,
        steps=1,
        prompts=2,
        samples=2,
        rank=4,
        alpha=4,
        eval_samples=0,
        max_new_tokens=20,
    )
    run = train(config, tmp_path / "run")
    assert run.status == "done"
    assert engine.log
    assert not [
        p for p in run.folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()
    ]
    monkeypatch.setenv(SERVER_KEY, "another-key")
    with pytest.raises(
        ValueError,
        match=r"answers /v1/models with 401 \(Unauthorized …\); set the environment variable "
        "VLLM_API_KEY to the server's key",
    ) as message:
        served_name(engine.url, "embedded")
    out = capsys.readouterr()
    assert not [
        secret
        for secret in (SECRET, "another-key")
        if secret in str(message.value) + out.out + out.err
    ]
    monkeypatch.setenv(SERVER_KEY, "schlüssel\n")
    with pytest.raises(
        ValueError, match="VLLM_API_KEY holds characters that no key has; set it again"
    ):
        served_name(engine.url, "embedded")


@pytest.mark.parametrize(
    "given, shown",
    [
        ("http://me:s3cret@localhost:8000", "http://localhost:8000"),
        ("me:s3cret@localhost:8000", "localhost:8000"),
        ("http://me:s3/cret@localhost", "http://localhost"),
        ("http://s3cret@host/v1", "http://host/v1"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(given, shown):
    with pytest.raises(
        ValueError, match=f"server: {shown} was given with a name or password.*VLLM_API_KEY"
    ) as message:
        server_address(given)
    assert not any(part in str(message.value) for part in ("me:", "s3", "cret"))


@pytest.mark.parametrize(
    "given",
    [
        "",
        "localhost",
        "localhost:8000",
        "http://",
        "http://:8000",
        "ftp://localhost",
        "file:///etc/passwd",
        "http://host:99999999",
        "http://host:port",
        "http://host?key=1",
        "http://host#x",
        "http://ho st",
        "http://ho\nst",
        "http://h%20o",
        "http://\x00",
        "\ud800",
        "http://host:0",
        "x" * 100_000,
    ],
)
def test_what_is_no_address_is_told(given):
    with pytest.raises(
        ValueError, match="is no address; give one such as http://localhost:8000"
    ) as message:
        server_address(given)
    assert len(str(message.value)) < 400
    assert str(message.value).isprintable()


GOOD = dict(object="chat.completion", model="policy", prompt_token_ids=[], choices=[])


class Player:
    "Plays one reply to every request but those for the list of models, on a bare socket."

    def __init__(self, play, models=None):
        self.play, self.models, self.requests = play, models, []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        with suppress(OSError):  # closed
            while True:
                threading.Thread(
                    target=self.serve, args=self.socket.accept()[:1], daemon=True
                ).start()

    def serve(self, connection):
        with suppress(OSError), connection:  # a client that leaves
            while head := self.head(connection):
                length = re.search(rb"content-length: (\d+)", head, re.I)
                left = int(length[1]) if length else 0
                while left > 0:
                    left -= len(connection.recv(min(left, 2**16)) or b" " * left)
                self.requests.append(head)
                if b"GET /v1/models" in head and self.models is None:
                    connection.sendall(
                        http(json.dumps(dict(data=[dict(id="policy", root=str(EMBEDDED))])))
                    )
                else:
                    return self.play(connection)

    def head(self, connection):
        head = b""
        while not head.endswith(b"\r\n\r\n") and (byte := connection.recv(1)):
            head += byte
        return head

    def close(self):
        self.socket.close()


def http(body="", status="200 OK", headers=""):
    body = body if isinstance(body, bytes) else body.encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body


def says(body="", status="200 OK", headers=""):
    return lambda connection: connection.sendall(http(body, status, headers))


def reply(*answers, prompt=None, **changed):
    "A well-formed reply, by and large."

    def made(ids, logp):
        return dict(
            index=0,
            token_ids=ids,
            logprobs=dict(content=[dict(token="x", logprob=p) for p in logp]),
        )

    return json.dumps(
        dict(
            GOOD,
            prompt_token_ids=PROMPT if prompt is None else prompt,
            choices=[made(*a) for a in answers],
        )
        | changed
    )


def flood(head, piece, times):
    def play(connection):
        connection.sendall(head)
        for _ in range(times):
            connection.sendall(piece)

    return play


def drip(head, piece, pause=0.1):
    def play(connection):
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return play


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def packed(connection):
    connection.sendall(http(BOMB, headers="Content-Encoding: gzip\r\n"))


POLICY = Policy.load()
PROMPT = POLICY.tokenize(TEXTS[:1], POLICY.encode([SAMPLES[0].image]))[0][0].tolist()
VOCABULARY = POLICY.model.get_input_embeddings().num_embeddings
BOMB = gzip.compress(bytes(2**26))
MIB = b"[1" + b",1" * (2**19 - 1)
LOST, SHAPE = "does not answer \\(", "does not answer with token ids and log-probabilities \\("
HEAD = b"HTTP/1.1 200 OK\r\n"

HOSTILE = {
    "a web page": (says("<!doctype html><title>hello</title>"), SHAPE + "Invalid JSON"),
    "nothing": (says(), SHAPE + "Invalid JSON"),
    "204": (says(status="204 No Content"), SHAPE + "Invalid JSON"),
    "null": (says("null"), SHAPE + "Input should be"),
    "a number": (says("7"), SHAPE + "Input should be"),
    "a list": (says("[]"), SHAPE + "Input should be"),
    "an empty object": (says("{}"), SHAPE + "choices: Field required"),
    "not UTF-8": (says(b'{"choices": "\xff\xfe"}'), SHAPE),
    "UTF-16": (says(reply(([5, 6], [-1, -1])).encode("utf-16")), SHAPE),
    "more behind the JSON": (
        says(reply(([5, 6], [-1, -1])) + "{}"),
        SHAPE + "Invalid JSON: trailing",
    ),
    "cut JSON": (says(reply(([5, 6], [-1, -1]))[:-9]), SHAPE + "Invalid JSON"),
    "no choices": (says(reply(choices=None)), SHAPE + "choices: Input should be"),
    "no ids": (
        says(reply(choices=[dict(logprobs=dict(content=[]))])),
        SHAPE + "choices.0.token_ids: Field required",
    ),
    "no log-probabilities": (
        says(reply(choices=[dict(token_ids=[5], logprobs=None)])),
        SHAPE + "choices.0.logprobs: Input should be",
    ),
    "a null log-probability": (
        says(reply(([5, 6], [-1, None]))),
        SHAPE + "choices.0.logprobs.content.1.logprob: Input should be",
    ),
    "a log-probability as text": (
        says(reply(([5, 6], [-1, "-1"]))),
        SHAPE + "choices.0.logprobs.content.1.logprob",
    ),
    "NaN": (
        says(reply(([5, 6], [-1, float("nan")]))),
        SHAPE + "choices.0.logprobs.content.1.logprob",
    ),
    "infinity": (
        says(reply(([5, 6], [-1, float("-inf")]))),
        SHAPE + "choices.0.logprobs.content.1.logprob",
    ),
    "a probability above 1": (
        says(reply(([5, 6], [-1, 5]))),
        SHAPE + "choices.0.logprobs.content.1.logprob",
    ),
    "a tiny probability": (says(reply(([5, 6], [-1, -1e308]))), "answers by other weights"),
    "ids as text": (
        says(reply((["5"], [-1]))),
        SHAPE + "choices.0.token_ids.0: Input should be a valid integer",
    ),
    "ids as fractions": (
        says(reply(([5.5], [-1]))),
        SHAPE + "choices.0.token_ids.0: Input should be a valid integer",
    ),
    "true as an id": (
        says(reply(([True], [-1]))),
        SHAPE + "choices.0.token_ids.0: Input should be a valid integer",
    ),
    "a negative id": (
        says(reply(([-1], [-1]))),
        SHAPE + "choices.0.token_ids.0: Input should be greater",
    ),
    "an id of 4,000 digits": (
        says(
            reply(choices=[]).replace(
                '"choices": []', '"choices": [{"token_ids": [%s]}]' % ("9" * 4000)
            )
        ),
        SHAPE + "choices.0.token_ids.0",
    ),
    "an id of 4,000,000 digits": (
        says(
            reply(choices=[]).replace(
                '"choices": []', '"choices": [{"token_ids": [%s]}]' % ("9" * 4_000_000)
            )
        ),
        SHAPE,
    ),
    "an id outside the vocabulary": (
        says(reply(([5, VOCABULARY], [-1, -1]))),
        f"gives a token {VOCABULARY}, and the model has {VOCABULARY}; serve the same model",
    ),
    "no tokens": (says(reply(([], []))), "gives an answer of 0 tokens where 1 to 8 were asked for"),
    "more tokens than asked": (
        says(reply(([5] * 9, [-1] * 9))),
        "gives an answer of 9 tokens where 1 to 8 were asked for",
    ),
    "fewer log-probabilities": (
        says(reply(([5] * 4, [-1] * 3))),
        "gives 3 log-probabilities of 4 tokens",
    ),
    "tokens behind the end": (
        says(reply(([POLICY.tokenizer.eos_token_id, 5], [-1, -1]))),
        "goes on behind the end of its turn",
    ),
    "two answers": (
        says(reply(([5], [-1]), ([5], [-1]))),
        "gives 2 answers where 1 were asked for",
    ),
    "no answer": (says(reply()), "gives 0 answers where 1 were asked for"),
    "another prompt": (
        says(reply(([5], [-1]), prompt=PROMPT[:-1])),
        r"read a prompt of \d+ tokens that should be",
    ),
    "no prompt": (says(reply(([5], [-1]), prompt=[])), "read a prompt of 0 tokens that should be"),
    "deep JSON": (says("[" * 10**6), SHAPE),
    "deep JSON in a field": (
        says(
            reply(([5], [-1]), usage=0).replace(
                '"usage": 0', '"usage": ' + "[" * 10**5 + "]" * 10**5
            )
        ),
        SHAPE,
    ),
    "300 MiB": (
        flood(HEAD + b"Content-Length: %d\r\n\r\n" % (300 * 2**20), MIB, 300),
        r"answers /v1/chat/completions with more than 4,202,496 bytes",
    ),
    "300 MiB in chunks": (
        flood(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"100000\r\n" + MIB + b"\r\n", 300),
        "with more than 4,202,496 bytes",
    ),
    "300 MiB till the end": (
        flood(HEAD + b"Connection: close\r\n\r\n", MIB, 300),
        "with more than 4,202,496 bytes",
    ),
    "a packed bomb": (packed, "packs its reply to /v1/chat/completions, though asked not to"),
    "silence": (
        lambda connection: time.sleep(60),
        "has not answered /v1/chat/completions within 1.5 seconds",
    ),
    "a slow head": (
        drip(HEAD, b"X-A: b\r\n"),
        "has not answered /v1/chat/completions within 1.5 seconds",
    ),
    "a slow body": (
        drip(HEAD + b"Content-Length: 9999\r\n\r\n", b" "),
        "has not answered /v1/chat/completions within 1.5 seconds",
    ),
    "a slow error": (
        drip(b"HTTP/1.1 400 Bad\r\nContent-Length: 9999\r\n\r\n", b" "),
        "has not answered /v1/chat/completions within 1.5 seconds",
    ),
    "continue for ever": (
        drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, 0),
        "within 1.5 seconds|" + LOST,
    ),
    "a head without end": (drip(HEAD, b"X-A: " + b"b" * 999 + b"\r\n", 0), LOST),
    "one line without end": (drip(b"", b"b" * 9999, 0), LOST),
    "no HTTP": (lambda c: c.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\x1b[2J\x07\r\n\r\n"), LOST),
    "cut at once": (lambda connection: connection.close(), LOST),
    "reset": (reset, LOST),
    "cut in the body": (lambda c: c.sendall(HEAD + b"Content-Length: 9999\r\n\r\n{"), LOST),
    "a wrong length": (lambda c: c.sendall(HEAD + b"Content-Length: minus\r\n\r\n{}"), LOST),
    "bad chunks": (lambda c: c.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}"), LOST),
    "400": (
        says(json.dumps(dict(error=dict(message="n must be 1"))), "400 Bad Request"),
        r"with 400 \(n must be 1\); look into its log",
    ),
    "400 with a text": (
        says(json.dumps(dict(error="n must be 1")), "400 Bad Request"),
        r"with 400 \(n must be 1\)",
    ),
    "400 with a number": (says(json.dumps(dict(error=7)), "400 Bad Request"), r"with 400 \(7\)"),
    "400 in colours": (
        says("\x1b[31mno\x1b[0m\x07\r\nDone.\u202e", "400 Bad Request"),
        r"with 400 \(\[31mno \[0m Done.\)",
    ),
    "400 with a page": (says("<html><h1>Bad", "400 Bad Request"), r"with 400 \(Bad Request\)"),
    "400 with deep JSON": (says("[" * 10**5, "400 Bad Request"), r"with 400 \(\[\["),
    "400 with 300 MiB": (
        flood(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n" % (300 * 2**20), MIB, 300),
        r"with 400 \(\[1,1,1",
    ),
    "400 without a word": (
        lambda c: c.sendall(b"HTTP/1.1 400 \r\nContent-Length: 0\r\n\r\n"),
        r"with 400 \(no word\)",
    ),
    "404": (says("Not Found", "404 Not Found"), r"with 404 \(Not Found\); look into its log"),
    "500 for ever": (says(json.dumps(dict(detail="oh")), "500 Oh"), r"with 500"),
    "an echo of the key": (
        says("key KEY is wrong", "400 Bad Request"),
        r"with 400 \(key … is wrong\)",
    ),
    "another protocol": (
        lambda c: c.sendall(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n"
        ),
        "with 101|" + LOST,
    ),
}
SECRET = "sk-9f8e7d6c5b4a"
ONCE = {
    "400",
    "400 with a text",
    "404",
    "null",
    "300 MiB",
    "more tokens than asked",
    "silence",
    "a packed bomb",
}


def bounded(work, seconds=60):
    "What a piece of work returns or raises; it may take so long, and 200 MiB."
    before, pool = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result(timeout=seconds)
    finally:
        pool.shutdown(wait=False)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_a_server_says_is_one_sentence(name, tmp_path, monkeypatch):
    play, message = HOSTILE[name]
    if "KEY" in name.upper():
        play = says(f"key {SECRET} is wrong", "400 Bad Request")
    monkeypatch.setattr("dr2seg_lib.models.http_client.RETRY_WAITS", (0.01, 0.02))
    monkeypatch.setattr(
        "dr2seg_lib.models.http_client.REPLY_SECONDS", 1.5 if "1.5 seconds" in message else 60
    )
    monkeypatch.setenv(SERVER_KEY, SECRET)
    player = Player(play)
    served = ServedPolicy(POLICY, player.url, "embedded", tmp_path)

    def ask():
        encoded = served.encode([SAMPLES[0].image])
        with torch.no_grad():
            served.generate(served.prefill(TEXTS[:1], encoded), 1, 8, 0.0)

    with pytest.raises(ValueError, match=f"^server: {player.url} .*({message})") as error:
        bounded(ask)
    player.close()
    sentence = str(error.value)
    assert SECRET not in sentence
    assert sentence.isprintable()
    assert len(sentence) < 500
    posts = sum(b"POST" in head for head in player.requests)
    repeated = "with 500" in message or (LOST in message and posts != 1)
    assert posts == (3 if repeated else 1)
    assert (name in ONCE) <= (posts == 1)


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in HOSTILE
        if re.match(
            "a web page|nothing|null|an empty|deep JSON$|300 MiB|a slow|no HTTP|404|not UTF", n
        )
    ],
)
def test_a_hostile_list_of_models_is_one_sentence(name, monkeypatch):
    monkeypatch.setattr("dr2seg_lib.models.http_client.RETRY_WAITS", ())
    player = Player(HOSTILE[name][0], models=True)
    with pytest.raises(ValueError, match=f"^server: {player.url} ") as error:
        bounded(lambda: list_models(player.url, patience=1.5))
    player.close()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "data",
    [
        [None],
        [{}],
        [dict(id=7)],
        [dict(id="x", root=7)],
        {},
        None,
        [dict(id="x" * 10**6)],
        [dict(id="\x1b[2J\u202e")],
        [dict(id="x", root="a\0b")],
    ],
    ids=lambda d: str(d)[:20],
)
def test_a_strange_list_of_models_is_one_sentence(data):
    player = Player(says(json.dumps(dict(data=data))), models=True)
    with pytest.raises(
        ValueError,
        match=f"^server: {player.url} (does not list its models as vLLM does|"
        "has .*, not embedded; start it by)",
    ) as error:
        served_name(player.url, "embedded")
    player.close()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "status",
    ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"],
)
def test_a_redirect_takes_the_key_nowhere(status, tmp_path, monkeypatch):
    monkeypatch.setenv(SERVER_KEY, SECRET)
    trap = Player(says("{}"), models=True)
    player = Player(says("", status, f"Location: {trap.url}/v1/chat/completions\r\n"))
    served = ServedPolicy(POLICY, player.url, "embedded", tmp_path)
    with pytest.raises(
        ValueError,
        match=rf"with {status[:3]} \(it sends us elsewhere\); give the address that answers itself",
    ):
        answered(served, longest=5)
    player.close(), trap.close()
    assert not trap.requests
    assert any(SECRET.encode() in head for head in player.requests)


def test_a_notebook_whose_loop_runs_may_ask(engine):
    async def cell():
        return list_models(engine.url)

    assert list(asyncio.run(cell())) == ["policy"]


@pytest.fixture
def interruptible():
    "A shell in the background starts its commands deaf to Ctrl-C."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_drops_what_is_in_flight(interruptible):
    left = threading.Event()

    def play(connection):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if not connection.recv(1):
            left.set()

    player = Player(play, models=True)
    with pytest.raises(KeyboardInterrupt):
        post_json(player.url, "/v1/models")
    assert left.wait(20), "the call was hung up"
    player.close()


def test_control_tokens_in_an_answer_of_a_server_are_text(engine, tmp_path):
    "A policy may sample them itself; nothing later takes them for an image or a turn's end."
    player = Player(says("{}"))
    served = ServedPolicy(POLICY, player.url, "embedded", tmp_path)
    pad, *ids = POLICY.tokenizer(
        "<|image_pad|><think><|vision_start|></think><description>the<|image_pad|></description>"
    )["input_ids"]
    encoded = served.encode([SAMPLES[0].image])
    prefix = served.prefill(TEXTS[:1], encoded)
    rows = torch.tensor([[pad, *ids]])
    logp = completion_statistics(served, prefix, rows, torch.ones_like(rows, dtype=torch.bool))[
        0, 0
    ].tolist()
    player.play = says(reply(([pad, *ids], logp)))
    with torch.no_grad():
        done = served.generate(prefix, 1, 40, 0.0)
    (one,) = to_responses(served, done)
    player.close()
    assert one.parsed.description == "the<|image_pad|>"
    assert served.logprobs(prefix, done.ids, done.mask).isfinite().all()
    with torch.no_grad():
        second = second_pass(served, encoded, prefix, [[one]], visionreasoner_prompt, 8, 1.0, [0])
    assert second[0][0] is not None, "by the policy itself, since the server is gone"
