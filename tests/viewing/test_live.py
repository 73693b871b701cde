"The live view of what is no run, and of one whose page is resized while it trains."

import gc
import random
import sys
import time
from itertools import cycle

import pytest

from dr2seg_lib.core.files import append_jsonl, write_json
from dr2seg_lib.viewing.live import live


@pytest.fixture
def late_errors(monkeypatch):
    "Errors that nobody could catch, such as those of a value that is let go."
    errors = []
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    return errors


def test_a_file_is_one_sentence(tmp_path, late_errors):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; give a run's folder"):
        live(tmp_path / "file")
    gc.collect()
    assert not late_errors


def test_a_page_that_is_resized_while_news_come_keeps_its_curves(tmp_path):
    "The thread that follows the run and the browser's wishes draw one after the other."
    write_json(tmp_path / "run.json", dict(status="running", parameters=dict(steps=60)))
    view = live(tmp_path)
    view.every = 0.001
    view.respond(None, dict(ask="figures"), [])
    row = dict(tokens=50.0, reward=1.0, accuracy=0.5, seconds=dict(first=1.0))
    for step, view.cols in zip(range(1, 61), cycle([1, 2, 3, 4])):
        append_jsonl(tmp_path / "metrics.jsonl", [row | dict(step=step)])
        time.sleep(0.03 * random.random())
    deadline = time.time() + 60
    while len(view.tail.rows) < 60 or set(view.figures) != {"curves", "seconds"}:
        assert view.thread.is_alive() and time.time() < deadline
        time.sleep(0.05)
    assert all(widget.comm for widget in view.figures.values())  # none is closed
    view.close()
