"The live view of what is no run."

import gc
import sys

import pytest

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
