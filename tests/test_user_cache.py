"""What the user's cache remembers, and that nothing depends on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmctx.encoders.image import ImageEncoderConfig, image_geometry
from mmctx.user_cache import remembered, user_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "mmctx"
    return tmp_path / "mmctx"


def test_an_answer_is_found_out_once_for_each_key(cache: Path) -> None:
    calls: list[str] = []

    def ask(key: str) -> dict[str, int]:
        return remembered("sizes", key, lambda: calls.append(key) or {"n": len(calls)})  # type: ignore[func-returns-value]

    assert [ask("a"), ask("b"), ask("a")] == [{"n": 1}, {"n": 2}, {"n": 1}]
    assert calls == ["a", "b"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": "other", "answer": {"n": 7}}', '{"key": "a"}'])
def test_a_file_that_is_damaged_or_of_another_key_is_written_anew(cache: Path, damage: str) -> None:
    remembered("sizes", "a", lambda: {"n": 1})
    (path,) = (cache / "sizes").iterdir()
    path.write_text(damage)
    assert remembered("sizes", "a", lambda: {"n": 2}) == {"n": 2}
    assert json.loads(path.read_text())["answer"] == {"n": 2}


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mmctx").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remembered("sizes", "a", lambda: {"n": 3}) == {"n": 3}


@pytest.mark.slow
def test_a_tower_that_is_known_needs_no_timm(cache: Path) -> None:
    config = ImageEncoderConfig(name="vit_tiny_patch16_224", image_size=32, shuffle=2, mean=(0.1, 0.2, 0.3))
    code = (
        "import sys; from mmctx.encoders.image import ImageEncoderConfig as C, image_geometry\n"
        f"print(image_geometry(C.model_validate_json({config.model_dump_json()!r})) , 'timm' in sys.modules)"
    )
    answers = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        for _ in range(2)
    ]
    assert answers == [f"{image_geometry(config)} True", f"{image_geometry(config)} False"]
