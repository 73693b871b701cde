"""Runs library notebooks, and keeps what their cells show.

python tests/notebooks.py [--write] NOTEBOOK...   without --write: says which shown text is stale
A cell marked `#| output: false` keeps none; one marked `#| eval: false` is not run.
"""

import argparse
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from dr2seg_lib.commands.execute import kernel_class

SKIPPED = re.compile(r"^#\|\s*eval:\s*false", re.M)
SILENT = re.compile(r"^#\|\s*output:\s*false", re.M)

# What one notebook leaves behind, the next must not find.
FRESH = "%reset -f\n%matplotlib inline\nimport torch\ntorch.set_grad_enabled(True)\ndel torch\n"


class Kernel:
    "One kernel for several notebooks: what one has imported the next need not wait for."

    def __init__(self):
        self.manager = kernel_class()()
        self.client = None

    def execute(self, path: Path):
        "The notebook, run from its own folder among no variables of another."
        nb = nbformat.read(path, as_version=4)
        whole = nb.cells
        fresh = nbformat.v4.new_code_cell(FRESH + f"%cd -q {path.parent.resolve()}")
        nb.cells = [fresh, *(c for c in whole if not SKIPPED.search(c.source))]
        runner = NotebookClient(nb, km=self.manager, timeout=600)
        runner.kc = self.client
        try:
            runner.execute()
        finally:
            self.client = runner.kc
            nb.cells = whole
        return nb

    def close(self):
        "Ends the kernel's process."
        if self.client is not None:
            self.client.stop_channels()
            run_sync(self.manager.shutdown_kernel)(now=True)


@contextmanager
def kernel():
    "A kernel that ends with the block."
    opened = Kernel()
    try:
        yield opened
    finally:
        opened.close()


WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar, say


def is_lasting(output) -> bool:
    "Whether an output is worth keeping: no warning, no widget that only lives in its kernel."
    data = output.get("data", {})
    return output.get("name") != "stderr" and (WIDGET not in data or "image/png" in data)


def text_of(output) -> str:
    "The text of one output; '' for a picture or a warning."
    if not is_lasting(output):
        return ""
    if output.output_type == "stream":
        return output.text
    return "".join(output.get("data", {}).get("text/plain", ""))


def shown(cell) -> str:
    return "".join(map(text_of, cell.get("outputs", []))).strip()


def stale_cells(path: Path, executed) -> list[str]:
    "The first lines of the cells whose committed text is not what comes out."
    committed = nbformat.read(path, as_version=4).cells
    pairs = zip(committed, executed.cells, strict=True)
    stale = [a for a, b in pairs if a.get("outputs") and shown(a) != shown(b)]
    return [cell.source.split("\n")[0] for cell in stale]


LIVING = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"


def write(path: Path, executed):
    "Stores the outputs, without warnings, counters, and what only a kernel or JupyterLab shows."
    executed.metadata.pop("widgets", None)
    for cell in executed.cells:
        if cell.cell_type != "code":
            continue
        cell.outputs = [] if SILENT.search(cell.source) else [*filter(is_lasting, cell.outputs)]
        cell.execution_count = None
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            for kind in LIVING:
                output.get("data", {}).pop(kind, None)
            if "execution_count" in output:
                output.execution_count = None
    nbformat.write(executed, path)


def current(python: Kernel, path: Path, to_write: bool) -> bool:
    "Whether a notebook shows what it says; with `to_write` it does from now on."
    try:
        executed = python.execute(path)
    except CellExecutionError as error:
        print(path, "fails:", error)
        return False
    if to_write:
        write(path, executed)
        return True
    cells = stale_cells(path, executed)
    print(path, "stale: " + "; ".join(cells) if cells else "current")
    return not cells


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with kernel() as python:
        stale = [path for path in args.notebooks if not current(python, path, args.write)]
    sys.exit(bool(stale))


if __name__ == "__main__":
    main()
