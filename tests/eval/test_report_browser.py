"""The page in a browser: nothing sticks out at a desktop's and at a phone's width."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mmctx
from mmctx.eval.report.sections import SECTIONS

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


@needs_browser
class TestInABrowser:
    """No page may be wider than its window: only boxes inside it scroll."""

    @pytest.mark.parametrize("num_runs", [1, 2])
    @pytest.mark.parametrize("width", [1280, 390])
    @pytest.mark.slow
    def test_nothing_sticks_out(self, two_runs: tuple[Path, Path], tmp_path: Path, num_runs: int, width: int) -> None:
        page = mmctx.report(*two_runs[:num_runs], out=tmp_path / "page.html")
        found = measure(page, tmp_path, width)
        assert found["width"] == width
        assert found["scroll"] <= width, found["wide"]
        assert found["sections"] > len(SECTIONS)
        shot = screenshot(page, tmp_path, width, 1600)
        pixels = np.asarray(Image.open(shot).convert("L"))
        assert pixels.shape[1] == width
        assert pixels.std() > 5  # something is on it
        assert len(np.unique(pixels[-400:])) > 8  # further down, too

    def test_a_page_that_sticks_out_is_noticed(self, tmp_path: Path) -> None:
        page = tmp_path / "wide.html"
        page.write_text(
            "<!doctype html><body style='margin:0'><section><div style='width:900px'>wide</div></section></body>"
        )
        assert measure(page, tmp_path, 390)["scroll"] == 900


def measure(page: Path, tmp_path: Path, width: int) -> dict[str, Any]:
    """Opens a page in a frame `width` wide, so that a phone's width does not depend on the browser's smallest window, and measures it.

    The measuring script is the test's: it is written into a copy, since frames of files may not look into each other.
    """
    script = """<script>addEventListener("load", () => {
      const root = document.scrollingElement, wide = [...document.querySelectorAll("body *")]
        .filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, .inner, .document, pre, svg"))
        .slice(0, 5).map(e => e.tagName + "." + e.className);
      parent.postMessage(JSON.stringify({width: innerWidth, scroll: root.scrollWidth, wide,
        sections: document.querySelectorAll("section").length}), "*");
    })</script>"""
    copy = tmp_path / "measured.html"
    copy.write_text(page.read_text() + script)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><iframe src="measured.html" style="width:{width}px;height:900px;border:0"></iframe><pre id="found"></pre>'
        '<script>addEventListener("message", e => document.getElementById("found").textContent = e.data)</script>'
    )
    dom = chromium(tmp_path, "--dump-dom", "--virtual-time-budget=8000", "--window-size=1600,1000", frame.as_uri())
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def screenshot(page: Path, tmp_path: Path, width: int, height: int) -> Path:
    """The top of a page, drawn in a frame of this width."""
    frame, shot = tmp_path / "shown.html", tmp_path / "shot.png"
    style = f"width:{width}px;height:{height}px;border:0;display:block"
    frame.write_text(
        f'<!doctype html><body style="margin:0"><iframe src="{page.name}" style="{style}"></iframe></body>'
    )
    whole = max(width, 600)
    chromium(tmp_path, f"--screenshot={shot}", "--hide-scrollbars", f"--window-size={whole},{height}", frame.as_uri())
    image = Image.open(shot)
    image.crop((0, 0, width, image.height)).save(shot)
    return shot


def chromium(tmp_path: Path, *arguments: str) -> str:
    """Runs it headless with a profile of its own; what it prints."""
    assert CHROMIUM is not None
    quiet = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
    )
    done = subprocess.run([CHROMIUM, *quiet, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
