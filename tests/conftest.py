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
for name in "NO_PROXY", "no_proxy":  # the servers of the tests are on this machine
    os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))

if "PYTEST_XDIST_WORKER" in os.environ:  # side by side, more threads each are ten times slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# The gate draws the same inputs every time, so that it fails for a change and not by luck;
# HYPOTHESIS_PROFILE=explore draws new ones, ten times as many where a test names no number.
settings.register_profile("gate", deadline=None, derandomize=True)  # a busy machine is no failure
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))


def pytest_collection_modifyitems(items):
    "Tests that drive a browser are skipped where there is none."
    if chromium():
        return
    reason = "no Chromium is found; install one, such as with apt-get install -y chromium"
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(pytest.mark.skip(reason=reason))
