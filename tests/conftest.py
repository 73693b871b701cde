"What every test relies on."

import os

import pytest
from browser import chromium
from hypothesis import settings

# Inherited by the kernels that tests start. Nothing is downloaded, and no bar is drawn.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "DR2SEG_WATCHED": "1",
}

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, more threads each are ten times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("project", deadline=None)  # a busy machine is no failure
settings.load_profile("project")


def pytest_collection_modifyitems(items):
    "Tests that drive a browser are skipped where there is none."
    if chromium():
        return
    reason = "no Chromium is found; install one, such as with apt-get install -y chromium"
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=reason))
