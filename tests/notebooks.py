"""Runs library notebooks, and keeps what their cells show.

python tests/notebooks.py [--write] NOTEBOOK...   without --write: says which shown text is stale
A cell marked `#| output: false` keeps none; one marked `#| eval: false` is not run.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from dr2seg_lib.commands.execute import kernel_class

SKIPPED = re.compile(r"^#\|\s*eval:\s*false", re.M)
SILENT = re.compile(r"^#\|\s*output:\s*false", re.M)


def execute(path: Path):
    "The notebook, run from its own folder in a kernel of its own."
    nb = nbformat.read(path, as_version=4)
    whole = nb.cells
    nb.cells = [c for c in whole if not SKIPPED.search(c.source)]
    client = NotebookClient(
        nb,
        timeout=600,
        kernel_manager_class=kernel_class(),
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute()
    nb.cells = whole
    return nb


def text_of(output) -> str:
    "The text of one output; '' for a picture or a warning."
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    return "".join(output.get("data", {}).get("text/plain", ""))


def shown(cell) -> str:
    return "".join(map(text_of, cell.get("outputs", []))).strip()


def stale_cells(path: Path, executed) -> list[str]:
    "The first lines of the cells whose committed text is not what comes out."
    committed = nbformat.read(path, as_version=4).cells
    pairs = zip(committed, executed.cells, strict=True)
    stale = [a for a, b in pairs if a.get("outputs") and shown(a) != shown(b)]
    return [cell.source.split("\n")[0] for cell in stale]


def write(path: Path, executed):
    "Stores the outputs, without warnings and counters."
    for cell in executed.cells:
        if cell.cell_type != "code":
            continue
        kept = [o for o in cell.outputs if o.get("name") != "stderr"]
        cell.outputs = [] if SILENT.search(cell.source) else kept
        cell.execution_count = None
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    nbformat.write(executed, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("notebooks", type=Path, nargs="+")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    stale = False
    for path in args.notebooks:
        executed = execute(path)
        if args.write:
            write(path, executed)
        else:
            cells = stale_cells(path, executed)
            stale = stale or bool(cells)
            print(path, "stale: " + "; ".join(cells) if cells else "current")
    sys.exit(stale)


if __name__ == "__main__":
    main()
