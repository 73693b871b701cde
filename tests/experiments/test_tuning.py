"A search by Ray Tune: trials are runs, the weak end early, and the table tells of all."

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from dr2seg_lib.core.settings import ClusterSettings
from dr2seg_lib.experiments.tuning import run_search, search_rows, search_table
from dr2seg_lib.runs.run_folder import Run

pytest.importorskip("ray", reason='Ray is missing; pip install "dr2seg_lib[cluster]"')
SHARED = dict(
    steps=6,
    segmenter="grabcut",
    lora=dict(rank=4, alpha=4),
    rollout=dict(questions_per_step=1, group_size=2, max_new_tokens=24),
    evaluation=dict(samples=2, every=1, every_samples=2),
    runtime=dict(checkpoint_every=1),
)


@pytest.mark.slow
def test_a_search_that_is_stopped_goes_on_and_is_a_table_of_runs(tmp_path):
    space, local = (
        {"optim.lr": {"loguniform": [1e-4, 1e-2]}},
        ClusterSettings(address="local", cpus=2),
    )
    with Run.create(tmp_path / "search", {}, bar=False) as run, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stop_under_way, run.folder)
        assert run_search(run, space, SHARED, 2, local) == []
        asked.result()
    assert run.status == "interrupted"
    before = search_rows(run.folder, space)
    assert max(row["steps"] for row in before) < SHARED["steps"]
    with Run.resume(run.folder, bar=False) as run:
        assert run_search(run, space, SHARED, 2, local) == []
    rows = search_rows(run.folder, space)
    assert len(rows) == 2
    assert {row["optim.lr"] for row in before} <= {row["optim.lr"] for row in rows}
    assert max(row["steps"] for row in rows) == SHARED["steps"]  # somebody came to the end
    for row in rows:
        assert row["status"] == ("done" if row["steps"] == SHARED["steps"] else "interrupted")
        assert 1e-4 <= row["optim.lr"] <= 1e-2
        assert 0 <= row["gIoU"] <= 1
    assert rows[0]["optim.lr"] != rows[1]["optim.lr"]
    print(search_table(rows, space))


def stop_under_way(search):
    until = time.monotonic() + 300
    while not list(search.glob("trial-*/checkpoints/step-000001")):
        assert time.monotonic() < until, "no trial has begun"
        time.sleep(0.05)
    (search / "stop").touch()
