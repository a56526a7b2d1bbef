"""The wheel by itself: what it holds, and that it trains and loads with nothing but the packages that it declares."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    names = [name for name in listed.decode().split("\0") if name and not name.startswith(("tests/", "notebooks/"))]
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel and, by links, the packages that it requires and those that these require."""
    folder = tmp_path_factory.mktemp("clean")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    ours = Distribution.at(packages / Path(metadata).parent)
    for found in required_by(ours).values():
        for top in {Path(file).parts[0] for file in found.files or [] if ".." not in Path(file).parts}:
            place = Path(str(found.locate_file(top)))
            if place.exists() and top != "__pycache__" and not (packages / top).exists():
                (packages / top).symlink_to(place)
    return folder / "bin" / "python"


def required_by(root: Distribution) -> dict[str, Distribution]:
    """What is installed along with a package, without any of its extras."""
    found: dict[str, Distribution] = {}
    waiting: list[tuple[Distribution, frozenset[str]]] = [(root, frozenset())]
    while waiting:
        package, extras = waiting.pop()
        for line in package.requires or []:
            needed = Requirement(line)
            if needed.marker and not any(needed.marker.evaluate({"extra": extra}) for extra in extras or {""}):
                continue
            name = canonicalize_name(needed.name)
            if name not in found or needed.extras:
                found[name] = distribution(name)
                waiting.append((found[name], frozenset(needed.extras)))
    return found


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run([str(python), *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"mmctx", next(n for n in names if "dist-info" in n).split("/")[0]}
    held = set(names)
    for folder in ("encoders", "datasets", "train"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"mmctx/{path.relative_to(ROOT).as_posix()}" in held
    assert "mmctx/configs/demo.yaml" in held
    assert not [name for name in names if name.endswith((".tar", ".safetensors", ".pyc"))]


def test_it_pulls_no_package_that_only_some_need(clean: Path, tmp_path: Path) -> None:
    extras = (
        "optuna",
        "peft",
        "lancedb",
        "wandb",
        "tensorboard",
        "open_clip",
        "datasets",
        "pycocoevalcap",
        "s3fs",
        "matplotlib",
    )
    asked = f"from importlib.util import find_spec; print([n for n in {extras} if find_spec(n)])"
    assert run(clean, "-c", asked, cwd=tmp_path).stdout.strip() == "[]"


def test_it_trains_and_evaluates_and_loads_alone(clean: Path, tree: dict[str, Any], tmp_path: Path) -> None:
    tree["train"]["steps"] = 2
    tree["eval"]["suites"] = ["loss", "retrieval"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    done = run(clean, "-m", "mmctx.cli", "train", "run.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    code = (
        "import sys, mmctx, torch; from pathlib import Path; from mmctx.api import load_model\n"
        "assert Path(mmctx.__file__).is_relative_to(sys.prefix), mmctx.__file__\n"
        "model, tokenizer, config = load_model(Path(sys.argv[1])); print(sum(p.numel() for p in model.parameters()))"
    )
    loaded = run(clean, "-c", code, str(Path(tree["run"]["dir"]) / tree["run"]["name"]), cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert int(loaded.stdout) > 10_000
