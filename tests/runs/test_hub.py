"A checkpoint goes to the hub and comes back: by its own client, to a server of the tests."

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Repository, hub
from PIL import Image

from dr2seg_lib.core.files import read_json, write_json
from dr2seg_lib.core.parameters import TrainConfig
from dr2seg_lib.data.mini import draw_sample
from dr2seg_lib.training.trainer import train

SMALL = {
    "rollout.questions_per_step": 2,
    "rollout.group_size": 3,
    "rollout.max_new_tokens": 60,
    "lora.rank": 4,
    "evaluation.samples": 0,
    "optim.lr": 0.02,
}
CLI = "from dr2seg_lib.cli import main; import sys; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A run, and one that stands on it."
    folder = tmp_path_factory.mktemp("trained")
    first = train(TrainConfig(steps=1, **SMALL), folder / "first").folder
    start = str(first / "checkpoints" / "step-000001")
    train(TrainConfig(steps=1, start=start, method="dpad", **SMALL), folder / "second")
    Image.fromarray(draw_sample(2_000_000).image).save(folder / "photo.png")
    return folder


@pytest.fixture
def server():
    with hub() as server:
        yield server


def dr2seg(server, home, *words, token=TOKEN):
    "The command, with a cache of its own and that hub."
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= dict(HF_ENDPOINT=server.address, HF_HOME=str(home), HF_HUB_DISABLE_XET="1")
    env |= dict(HF_TOKEN=token) if token else {}
    command = [sys.executable, "-c", CLI, *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def answer(server, home, photo, out, *words):
    "The record of a segmented photo, without the name of who was asked."
    question = "which object is the largest one?"
    done = dr2seg(server, home, "segment", photo, question, *words, "--out", out)
    assert done.returncode == 0, done.stderr
    record = read_json(Path(out) / "photo.segment.json")
    return {k: v for k, v in record.items() if k != "adapter"}


def test_a_checkpoint_holds_the_name_of_its_model(trained):
    for run in "first", "second":
        config = trained / run / "checkpoints" / "step-000001" / "adapter_config.json"
        assert read_json(config)["base_model_name_or_path"] == "embedded"


def test_what_is_pushed_answers_in_a_new_cache_bit_for_bit(trained, server, tmp_path):
    run = trained / "second"
    done = dr2seg(server, tmp_path / "home", "push", run, "me/second", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{server.address}/me/second" in done.stdout
    repository = server.repositories["me/second"]
    files = repository.commits[repository.branch]
    assert repository.private and {"README.md", "run.json", "adapter_config.json"} <= files.keys()
    assert "optimizer.pt" not in files and "start/adapter_model.safetensors" in files
    photo, checkpoint = trained / "photo.png", run / "checkpoints" / "step-000001"
    here = answer(server, tmp_path / "home", photo, tmp_path / "a", "--adapter", checkpoint)
    for number, words in enumerate((["--adapter", "me/second"], ["--model", "me/second"])):
        new = tmp_path / f"new-{number}"
        assert answer(server, new, photo, tmp_path / f"b{number}", *words) == here
    assert here["method"] == "dpad" and here["model"] == "embedded"
    plain = answer(server, tmp_path / "home", photo, tmp_path / "c", "--method", "dpad")
    assert plain["response"]["text"] != here["response"]["text"]  # the adapter does something


def test_a_revision_is_loaded_by_its_name(trained, server, tmp_path):
    for run in "first", "second":
        assert dr2seg(server, tmp_path / "home", "push", trained / run, "me/x").returncode == 0
    first, second = server.repositories["me/x"].commits
    photo, home = trained / "photo.png", tmp_path / "new"
    local = answer(
        server, home, photo, tmp_path / "a", "--adapter", trained / "first/checkpoints/step-000001"
    )
    old = answer(server, home, photo, tmp_path / "b", "--adapter", f"me/x@{first}")
    assert old == local
    missing = dr2seg(server, home, "segment", photo, "what?", "--adapter", "me/x@v9")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert "me/x@v9 does not exist here, and the hub does not give it" in missing.stderr


def test_nothing_of_this_machine_is_pushed(trained, server, tmp_path):
    assert dr2seg(server, tmp_path / "home", "push", trained / "second", "me/x").returncode == 0
    repository = server.repositories["me/x"]
    files = repository.commits[repository.branch]
    record = json.loads(files["run.json"])
    assert record["parameters"]["start"] == "step-000001"
    assert not {"host", "pid", "error", "resumed"} & record.keys()
    for name, data in files.items():
        assert str(trained).encode() not in data, name
    card = files["README.md"].decode()
    assert "-p model.adapter me/x" in card and 'from_pretrained(model, "me/x")' in card


def test_an_older_checkpoint_with_a_path_in_it_loads_and_is_pushed_with_a_name(
    trained, server, tmp_path
):
    old = tmp_path / "old"
    shutil.copytree(trained / "first/checkpoints/step-000001", old)
    (old / "manifest.json").unlink()
    config = read_json(old / "adapter_config.json")
    path = "/elsewhere/site-packages/dr2seg_lib/weights/policy"
    write_json(old / "adapter_config.json", config | dict(base_model_name_or_path=path))
    photo, home = trained / "photo.png", tmp_path / "home"
    new = trained / "first/checkpoints/step-000001"
    words = "--adapter", new, "--max-new-tokens", 60
    here = answer(server, home, photo, tmp_path / "a", *words)
    assert answer(server, home, photo, tmp_path / "b", "--adapter", old, *words[2:]) == here
    assert dr2seg(server, home, "push", old, "me/old").returncode == 0
    repository = server.repositories["me/old"]
    pushed = json.loads(repository.commits[repository.branch]["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "embedded"
    assert "run.json" not in repository.commits[repository.branch]
    assert answer(server, home, photo, tmp_path / "c", "--model", "me/old", *words[2:]) == here


def test_without_a_token_push_is_a_sentence(trained, server, tmp_path):
    done = dr2seg(server, tmp_path / "home", "push", trained / "first", "me/x", token=None)
    assert done.returncode == 2 and not server.seen
    assert done.stderr == (
        "dr2seg: push needs a token of the hub; log in by hf auth login, or set HF_TOKEN\n"
    )


def test_a_wrong_token_and_a_public_repository_are_sentences(trained, server, tmp_path):
    words = server, tmp_path / "home", "push", trained / "first", "me/x"
    done = dr2seg(*words, token="hf_wrong")
    assert done.returncode == 2 and "me/x cannot be written on the hub (" in done.stderr
    assert done.stderr.count("\n") == 1 and not server.repositories
    server.repositories["me/x"] = Repository(private=False)
    done = dr2seg(*words, "--private")
    assert done.returncode == 2 and "me/x is there and is public" in done.stderr
    assert not server.repositories["me/x"].commits


def test_an_adapter_of_somebody_else_is_checked_like_a_file(trained, server, tmp_path):
    assert dr2seg(server, tmp_path / "home", "push", trained / "first", "me/x").returncode == 0
    repository = server.repositories["me/x"]
    files = dict(repository.commits[repository.branch])
    record = json.loads(files["run.json"])
    record["parameters"]["method"]["name"] = "evil.py:method"
    repository.commit(files | {"run.json": json.dumps(record).encode(), "evil.py": b"x"})
    photo = trained / "photo.png"
    done = dr2seg(server, tmp_path / "new", "segment", photo, "what?", "--model", "me/x")
    assert done.returncode == 2 and "was trained by code of a file" in done.stderr
    assert not list((tmp_path / "new").rglob("evil.py"))
    torn = files["adapter_model.safetensors"][:-9]
    repository.commit(files | {"adapter_model.safetensors": torn})
    done = dr2seg(server, tmp_path / "new", "segment", photo, "what?", "--model", "me/x")
    assert done.returncode == 2 and "is damaged" in done.stderr
