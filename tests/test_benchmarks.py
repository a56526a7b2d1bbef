"""Every benchmark runs at tiny size and reports what it promises. Times are not looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # many fresh processes, each with its imports

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(script: str, **environment: str) -> dict:
    pytest.importorskip("open_clip")
    command = [sys.executable, str(BENCHMARKS / script), "--quick", "--json", "--repeats", "1"]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parent,
        env={**os.environ, "PYTHONPATH": path} | environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["machine"]["cores"] == os.cpu_count()
    assert "mmctx" in result["versions"]
    return result


def test_tar_read():
    result = run("tar_read.py")
    assert set(result["shards"]) == {"image", "token", "plain token"}
    for found in result["shards"].values():
        assert found["samples_per_second"].keys() - {"webdataset"} == found["times_faster"].keys()
        assert all(ratio["best"] > 0 for ratio in found["times_faster"].values())
    assert result["bars"] == {"image": 6.0, "token": 18.0}


def test_train_step():
    result = run("train_step.py")
    assert result["bars"] == {"padded": 4.0, "packed": 2.3, "equal": 0.98}
    assert set(result["uneven"]["seconds"]) == {"padded", "packed", "one by one", "ours"}
    assert set(result["equal"]["times_faster"]["clock"]) == {"equal"}


def test_cross_entropy():
    result = run("cross_entropy.py")
    for dtype in ("float32", "bfloat16"):
        assert {"naive", "ours"} <= set(result[dtype]["seconds"]) == set(result[dtype]["peak_mib"])
        assert result["errors"][dtype]["ours"]["loss"] < 1e-4


def test_contrastive():
    result = run("contrastive.py")  # asserts equal losses and gradients
    assert result["bars"] == {"memory": 4.0, "time": 0.75}
    for loss in ("softmax", "sigmoid"):
        assert set(result[loss]["our_peak_mib"]) == {"128", "256", "512"}
        assert result[loss]["time_ratio"].keys() == {"clock", "processor"}


def test_image_text_says_why_a_peer_is_left_out(tmp_path):
    """pip is told to look nowhere, so the peers' environments cannot be made."""
    result = run(
        "image_text.py", MMCTX_BENCH=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="", PIP_CONFIG_FILE=os.devnull
    )
    assert set(result["skipped"]) == {"open_clip", "energon"}
    assert all("pip install" in reason for reason in result["skipped"].values())
    assert set(result["samples_per_second"]) == {"float", "uint8"} == set(result["first_batch_seconds"])
    assert result["against"] == {}


def test_plan_scale():
    script = str(BENCHMARKS / "plan_scale.py")
    done = subprocess.run(
        [sys.executable, script, "--quick", "--json"], capture_output=True, text=True, cwd=BENCHMARKS.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["samples"] == 1_000_000
    assert result["largest_bin"] <= 4096
    assert {"seek_seconds", "resident_mib", "samples_per_second", "fill", "imbalance", "books_fill"} <= result.keys()


def test_resume():
    result = run("resume.py")
    assert result["bit_identical"]
    assert {f"ours {k}" for k in (0, 2, 5, 1000)} <= set(result["seconds"])
    assert {f"accelerate {k}" for k in (0, 2, 5)} <= set(result["seconds"])
    assert set(result["ours_over_cold"]["clock"]["seek"]) == {"2", "5", "1000"}


def test_extend_context():
    result = run("extend_context.py")
    assert result["positions"] == ["0..31", "32..63", "64..127", "128..255"]
    assert all(7 < loss < 8.5 for losses in result["loss"].values() for loss in losses)  # of 2,368 rows, barely trained
    assert all(0.5 < ratio < 1 for ratio in result["after_over_before"])


def test_memory():
    result = run("memory.py")  # asserts equal losses and gradients
    assert result["bars"] == {"times_less": 5.0, "flat": 1.15}
    assert set(result["growth"]) == {"512", "1024"}
    kept, frugal = (result["sides"][name]["peak"] for name in ("ours, all kept", "ours, full and tiles"))
    assert 0 < frugal < kept


def test_long_document():
    result = run("long_document.py")
    assert set(result["lengths"]) == {"512", "1024"}
    for point in result["lengths"].values():
        assert len(point["losses"]) == 3
        assert point["losses"][2] < point["losses"][0]
        assert point["pictures"] >= 2
        assert point["clips"] >= 1


def test_sequence_parallel():
    result = run("sequence_parallel.py")
    assert result["loss_error"] < 1e-6
    assert result["gradient_error"] < 1e-5
    assert max(result["kept"]["ranks"]) < 0.75 * result["kept"]["one process"]
    assert set(result["faster_than"]) == {"one process, one thread", "one process, two threads"}


def test_store():
    pytest.importorskip("lancedb", reason="pip install 'mmctx[memory]'")
    result = run("store.py")  # asserts that exact search equals brute force
    assert set(result["times_brute_force"]) == {"exact", "index", "exact at once", "index at once"}
    assert result["built"]["index"]["recall"] >= 0.97


def test_memory_attention():
    pytest.importorskip("faiss")
    result = run("memory_attention.py")
    names = {"full attention", "windows alone", "memory, all", "memory, all, faiss", "memory, 16k"}
    assert set(result["sides"]) == set(result["growth"]) == names
    for points in result["sides"].values():
        assert set(points) == {"256", "512"}
        assert all(point["processor"] > 0 and point["gflops"] > 0 for point in points.values())
