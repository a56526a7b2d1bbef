"""The notebooks run as they stand, and what is committed of them is what a run showed: complete, small, of no machine in particular."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NAMES = ["01_quickstart", "02_packing_and_plan", "03_long_context", "04_embeddings", "05_your_data", "06_memory"]
MOST_KIB = 350
MACHINE = re.compile(r"""(?<![\w.:/\\-])/(?:work|tmp|home|root|Users|opt|usr|var|mnt|check)\b|[A-Z]:\\""")
TOOLS = runpy.run_path(str(FOLDER / "execute.py"))


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cell: Any) -> str:
    """All text that a cell gave, pictures and players left out."""
    return json.dumps(
        [
            output.get("text", "") + "".join(v for k, v in output.get("data", {}).items() if k.startswith("text/"))
            for output in cell.outputs
        ]
    )


def test_these_are_all() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_committed_as_executed(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    kinds = [output.output_type for cell in code(notebook) for output in cell.outputs]
    assert "error" not in kinds
    assert sum("image/png" in o.get("data", {}) for cell in code(notebook) for o in cell.outputs) >= 1
    assert sum(1 for cell in code(notebook) if cell.outputs) >= len(code(notebook)) / 2


@pytest.mark.parametrize("name", NAMES)
def test_small_and_of_no_machine(name: str) -> None:
    notebook = read(name)
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_KIB * 1024
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(not cell.metadata for cell in notebook.cells)
    for cell in notebook.cells:
        text = cell.source + (said(cell) if cell.cell_type == "code" else "")
        text = re.sub(r"base64,[\w+/=]+", "", text)
        assert not MACHINE.search(text), f"{MACHINE.search(text)} in {text[:200]}"
        assert "\x1b" not in text, "control characters of a terminal"


@pytest.mark.parametrize("name", NAMES)
def test_reads_well(name: str) -> None:
    """It begins with a title, no cell is long, and links to other notebooks lead somewhere."""
    notebook = read(name)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert all(len(cell.source.splitlines()) <= 50 for cell in notebook.cells)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert all((FOLDER / target).exists() for target in re.findall(r"\]\((?!http)([^)#]+)\)", prose))


def test_machine_paths_are_found() -> None:
    for path in ("in /root/x", "file:/tmp/a", "see /home/me", 'File "/usr/lib/python3"'):
        assert MACHINE.search(path.replace("file:", "file: "))
    for path in ("data/tmp/x", "runs/root/x", "https://host/tmp/x", "a/home/b"):
        assert not MACHINE.search(path)


def test_pictures_become_smaller_and_stay_what_they_are() -> None:
    picture = Image.linear_gradient("L").convert("RGB")
    whole = io.BytesIO()
    picture.save(whole, "png", compress_level=0)
    before = base64.b64encode(whole.getvalue()).decode()
    after = TOOLS["smaller"](before)
    reduced = Image.open(io.BytesIO(base64.b64decode(after))).convert("RGB")
    assert len(after) < len(before) / 4
    assert reduced.size == picture.size
    assert max(abs(a - b) for a, b in zip(picture.tobytes(), reduced.tobytes(), strict=True)) <= 8
    assert TOOLS["smaller"](after) == after or len(TOOLS["smaller"](after)) < len(after)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all: what one notebook built, the next finds."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_runs(name: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep))
    monkeypatch.setenv("IPYTHONDIR", str(workplace / "ipython"))
    copy = workplace / f"{name}.ipynb"
    shutil.copy(FOLDER / f"{name}.ipynb", copy)
    notebook = TOOLS["execute"](copy, workplace)  # raises where a cell fails
    wanted, found = (
        [sorted({kind for o in cell.outputs for kind in o.get("data", {}) if "image" in kind}) for cell in code(n)]
        for n in (read(name), notebook)
    )
    assert found == wanted, "the pictures of a run are not those that are committed"
    for cell in code(notebook):
        assert not MACHINE.search(re.sub(r"base64,[\w+/=]+", "", said(cell)))
