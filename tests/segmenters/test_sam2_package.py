"SAM 2 is an extra: nothing but itself needs the package."

import subprocess
import sys

import pytest

WITHOUT_SAM2 = """
import sys
sys.modules["sam2"] = None
from dr2seg_lib.segmenters.loading import load_segmenter
try:
    print(type(load_segmenter(sys.argv[1])).__name__)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "name, line",
    [
        ("grabcut", "GrabCutSegmenter"),
        (
            "embedded",
            "segmenter: SAM 2 needs the package sam2, which is not installed; "
            "see the README's installation, or use the segmenter grabcut",
        ),
    ],
)
def test_without_sam2_the_others_work(name, line):
    command = [sys.executable, "-c", WITHOUT_SAM2, name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == line + "\n", done.stderr
