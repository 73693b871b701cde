"A small server that speaks vLLM's protocol and really generates."

import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dr2seg_lib.models.policy import Policy
from dr2seg_lib.models.requirements import EMBEDDED

LOCK = threading.Lock()  # transformers loads one model at a time, and engines may share a policy


class Refusal(Exception):
    def __init__(self, code, message):
        self.code, self.message = code, message


class Engine(ThreadingHTTPServer):
    "The embedded policy behind the protocol; each adapter it loads is a policy of its own."

    daemon_threads = True

    def __init__(self, policy=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.url, self.lock = f"http://127.0.0.1:{self.server_port}", LOCK
        self.policies, self.base = {"policy": policy or Policy.load()}, "policy"
        self.pictures, self.dies_at, self.dead = (
            [],
            None,
            False,
        )  # at which chat request; and whether it has
        self.fresh()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fresh(self):
        self.root, self.log, self.troubles, self.change, self.meet, self.key = (
            str(EMBEDDED),
            [],
            [],
            lambda reply: reply,
            None,
            "",
        )
        self.policies = {self.base: self.policies[self.base]}

    def die(self):
        "As a killed process: nobody listens, and what was under way gets no answer."
        self.dead = True
        threading.Thread(target=self.stop, daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()

    def chats(self):
        return sum(path == "/v1/chat/completions" for path, _ in self.log)

    def list_models(self):
        return dict(
            object="list",
            data=[
                dict(
                    id=n,
                    object="model",
                    root=self.root if n == self.base else "",
                    parent=None if n == self.base else self.base,
                )
                for n in self.policies
            ],
        )

    def load(self, body):
        name, path = body["lora_name"], Path(body["lora_path"])
        with self.lock:
            return self.add(name, path)

    def add(self, name, path):
        if name in self.policies:
            raise Refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_config.json").is_file():
            raise Refusal(404, f"No adapter found for {path}")
        if json.loads((path / "adapter_config.json").read_text())["modules_to_save"]:
            raise Refusal(400, "vLLM only supports modules_to_save being None.")
        self.policies[name] = Policy.load().load_adapter(path)
        return f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body):
        if body["lora_name"] not in self.policies:
            raise Refusal(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        del self.policies[body["lora_name"]]
        return f"Success: LoRA adapter '{body['lora_name']}' removed successfully."

    def chat(self, body):
        if body["model"] not in self.policies:
            raise Refusal(404, f"The model `{body['model']}` does not exist.")
        if body["n"] > 1 and not body["temperature"]:
            raise Refusal(400, f"n must be 1 when using greedy sampling, got {body['n']}.")
        policy, (system, user) = self.policies[body["model"]], body["messages"]
        plain = dict(
            top_p=1,
            top_k=-1,
            min_p=0,
            repetition_penalty=1,
            ignore_eos=True,
            stop_token_ids=[policy.tokenizer.eos_token_id],
        )
        assert {k: body[k] for k in plain} == plain, (
            "the model's generation_config would have a say"
        )
        picture, text = user["content"]
        self.pictures.append(picture["image_url"]["url"])
        kind, data = picture["image_url"]["url"].split(",", 1)
        assert kind == "data:image/png;base64"
        assert body["logprobs"]
        assert body["return_token_ids"]
        image = np.array(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        chat = policy.processor.apply_chat_template(
            [system, dict(role="user", content=[dict(type="image"), text])],
            add_generation_prompt=True,
        )
        prompt = policy.processor(text=[chat], images=[image])["input_ids"][0]
        seeds = None if body["seed"] is None else [body["seed"] + i for i in range(body["n"])]
        with self.lock, torch.no_grad():
            done = policy.generate(
                policy.prefill([text["text"]], policy.encode([image])),
                body["n"],
                body["max_completion_tokens"],
                body["temperature"],
                seeds,
            )
        rows = [
            (ids[m].tolist(), logp[m].tolist())
            for ids, logp, m in zip(done.ids, done.logp, done.mask)
        ]
        choices = [
            dict(
                index=i,
                message=dict(
                    role="assistant", content=policy.tokenizer.decode(ids, skip_special_tokens=True)
                ),
                token_ids=ids,
                logprobs=dict(
                    content=[
                        dict(token=policy.decode_token(t), logprob=p) for t, p in zip(ids, logp)
                    ]
                ),
            )
            for i, (ids, logp) in enumerate(rows)
        ]
        return self.change(
            dict(
                object="chat.completion",
                model=body["model"],
                choices=choices,
                prompt_token_ids=list(prompt),
            )
        )


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, value, code=200):
        if self.server.dead:
            return self.connection.close()
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def allowed(self):
        given = self.headers.get("Authorization", "")
        if self.server.key and given != f"Bearer {self.server.key}":
            self.send(dict(error=f"Unauthorized {given.removeprefix('Bearer ')}"), 401)
        else:
            return True

    def do_GET(self):
        if not self.allowed():
            return
        self.send(self.server.list_models()) if self.path == "/v1/models" else self.send(
            "Not Found", 404
        )

    def do_POST(self):
        if not self.allowed():
            return
        engine, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine.log.append((self.path, body.get("lora_name") or body["model"]))
        if engine.chats() == engine.dies_at:
            engine.die()
        if engine.meet:
            engine.meet.wait()
        trouble = engine.troubles.pop(0) if engine.troubles else None
        if trouble == "cut":
            return self.connection.close()  # no answer at all
        if trouble:
            return self.send(dict(error=dict(message="out of order", code=trouble)), trouble)
        does = {
            "/v1/chat/completions": engine.chat,
            "/v1/load_lora_adapter": engine.load,
            "/v1/unload_lora_adapter": engine.unload,
        }[self.path]
        try:
            self.send(does(body))
        except Refusal as e:
            self.send(
                dict(error=dict(message=e.message, type="BadRequestError", code=e.code)), e.code
            )
