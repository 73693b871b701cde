"Files that are whole or absent, and what is said of weights that are not."

import json
import pickle
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

from dr2seg_lib.core.files import (
    atomic_write,
    find_checkpoint_problem,
    find_truncation,
    naming_load_errors,
    read_json,
    write_json,
)


def test_what_ends_early_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    write_json(tmp_path / "a.json", 1)
    for error in ValueError, KeyboardInterrupt:
        with pytest.raises(error), atomic_write(tmp_path / "a.json") as f:
            f.write("2")
            raise error
        assert read_json(tmp_path / "a.json") == 1
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    with atomic_write(tmp_path / "a.json") as f:
        f.write("3")
    assert read_json(tmp_path / "a.json") == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("no\nnetwork"),
        KeyError("model"),
        pickle.UnpicklingError("bad"),
        struct.error("4 bytes"),
        StopIteration(),
        RuntimeError("x " * 900),
    ],
    ids=lambda e: type(e).__name__,
)
def test_whatever_a_library_says_is_one_sentence(error):
    with pytest.raises(ValueError) as told:
        with naming_load_errors("model tiny", "fetch it again"):
            raise error
    said = str(told.value)
    assert said.startswith("model tiny cannot be loaded (")
    assert said.endswith("); fetch it again")
    assert "\n" not in said
    assert len(said) < 260


@pytest.fixture
def checkpoint(tmp_path):
    "Two shards with their index."
    for i in (1, 2):
        save_file({f"w{i}": np.zeros(50)}, tmp_path / f"model-{i}.safetensors")
    for name in "config.json", "tokenizer.json":
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps(dict(weight_map=dict(w1="model-1.safetensors", w2="model-2.safetensors")))
    )
    return tmp_path


def test_a_whole_checkpoint_is_not_torn(checkpoint):
    assert find_checkpoint_problem(checkpoint) is None


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_shard_cut_anywhere_is_named(checkpoint, keep):
    file = checkpoint / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert find_checkpoint_problem(checkpoint) == find_truncation(file)
    assert find_truncation(file).startswith(
        "model-2.safetensors is cut short or no safetensors file: "
    )


def test_a_pointer_of_git_lfs_is_no_shard(checkpoint):
    (checkpoint / "model-1.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    )
    assert "model-1.safetensors is cut short or no safetensors file" in find_checkpoint_problem(
        checkpoint
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("model-1.safetensors", "model-1.safetensors is missing"),
        ("config.json", "config.json is missing"),
        ("tokenizer.json", "tokenizer.json is missing"),
    ],
)
def test_a_missing_file_is_named(checkpoint, name, words):
    (checkpoint / name).unlink()
    assert find_checkpoint_problem(checkpoint) == words


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}']
)
def test_a_broken_index_is_named(checkpoint, text):
    (checkpoint / "model.safetensors.index.json").write_text(text)
    assert (
        find_checkpoint_problem(checkpoint)
        == "model.safetensors.index.json does not map weights to files"
    )
