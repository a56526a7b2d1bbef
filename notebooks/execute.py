"""Runs notebooks and keeps what they show: `python notebooks/execute.py 01_quickstart ...`, or all of them without a name.

Their data and runs lie in data/ and runs/ of the folder it is called from.
"""

from __future__ import annotations

import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

HERE = Path(__file__).resolve().parent
SECONDS = 600  # that a cell may take, on a busy machine


def execute(path: Path, folder: Path) -> NotebookNode:
    """The notebook with what its cells give when they run in `folder`.

    Nothing of the machine is kept: no times, no kernel's name or place. A cell may choose its threads; without a word from outside it has one.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails; the message shows the cell and its traceback.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are no faster with more
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute()
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return nbformat.from_dict(notebook)


def smaller(png: str) -> str:
    """The same picture in base64 with a palette of 64 colours, which drawings hardly show: a quarter of the size."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    reduced = io.BytesIO()
    picture.quantize(64, dither=Image.Dither.NONE).save(reduced, "png", optimize=True)
    return min(png, base64.b64encode(reduced.getvalue()).decode(), key=len)


def main(names: list[str]) -> None:
    """Executes in place and says how long each took and how large it became."""
    for path in [HERE / f"{name}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb")):
        started = time.perf_counter()
        nbformat.write(execute(path, Path.cwd()), path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
