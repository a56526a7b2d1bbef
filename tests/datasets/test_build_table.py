"""Tables of every form give the same samples."""

from __future__ import annotations

import base64
import csv
import datetime
import gzip
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_shards import encode_audio, encode_image, random_clip, random_pixels
from reading import contents, left_out, read_back, shards_of

from mmctx.datasets.build.rows import read_rows
from mmctx.datasets.build.table import Columns, build_table
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import ConfigError, DataError

OPTIONS = BuildOptions(num_workers=1, samples_per_shard=3)


def write_table(path: Path, rows: list[dict[str, Any]], row_group: int = 2) -> Path:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(
            pyarrow.Table.from_pylist(rows), path, row_group_size=row_group
        )
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def picture(number: int) -> np.ndarray:
    return random_pixels(number, 5, 4 + number)


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "media").mkdir()
    found = []
    for number in range(8):
        (tmp_path / "media" / f"{number}.png").write_bytes(encode_image(picture(number), "PNG"))
        (tmp_path / "media" / f"{number}.wav").write_bytes(encode_audio(random_clip(number, 90), 8000, "WAV", "FLOAT"))
        text = f'caption "{number}",\nin two lines' if number % 2 else f"caption {number}"
        entry = {"pic": f"media/{number}.png", "snd": f"media/{number}.wav", "words": text, "id": f"n.{number}"}
        found.append(entry | {"mood": "good"})
    return found


CHOSEN = Columns(image="pic", audio="snd", text="words", key="id")


@pytest.mark.parametrize("form", ["x.jsonl", "x.json", "x.csv", "x.tsv", "x.parquet", "x.jsonl.gz"])
def test_every_form_gives_the_same_samples(tmp_path: Path, rows, tokenizer, form: str) -> None:
    table = write_table(tmp_path / form, rows)
    summary = build_table([table], tmp_path / "out", CHOSEN, options=OPTIONS)
    assert summary["counts"] == {"train": 8}
    assert [len(read_back([s], tokenizer)) for s in shards_of(tmp_path / "out")] == [3, 3, 2]
    found = read_back(shards_of(tmp_path / "out"), tokenizer, ("txt", "json:mood"))
    for number, row in enumerate(rows):
        sample = found[f"n%2E{number}"]
        assert [tokenizer.decode(ids) for ids in sample.texts] == [row["words"], "good"]
        assert torch.equal(sample.image.values, torch.from_numpy(picture(number)).permute(2, 0, 1))
        np.testing.assert_array_equal(sample.audio.values[1:, 0], random_clip(number, 90))


@pytest.mark.parametrize("form", ["x.jsonl", "x.csv", "x.parquet"])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 7, 8, 11, 15, 16])
def test_rows_from_any_row_on(tmp_path: Path, rows, form: str, start: int) -> None:
    (tmp_path / "b").mkdir()
    tables = [write_table(tmp_path / form, rows), write_table(tmp_path / "b" / form, rows[::-1])]
    expected = [row["id"] for row in rows + rows[::-1]]
    found = list(read_rows(tables, start))
    assert [row["id"] for _, _, row in found] == expected[start:]
    assert [(path, number) for path, number, _ in found] == [(t, n) for t in tables for n in range(8)][start:]


def test_bytes_in_cells(tmp_path: Path, tokenizer) -> None:
    png = encode_image(picture(1), "PNG")
    cells = [png, {"bytes": png, "path": "x.png"}, {"bytes": None, "path": "one.png"}]
    (tmp_path / "one.png").write_bytes(png)
    for number, cell in enumerate(cells):
        write_table(tmp_path / f"{number}.parquet", [{"image": cell, "text": "it", "thumb": b"abc"}])
    address = "data:image/png;base64," + base64.b64encode(png).decode()
    write_table(tmp_path / "3.jsonl", [{"image": address, "text": "it"}])
    for number, name in enumerate(["0.parquet", "1.parquet", "2.parquet", "3.jsonl"]):
        build_table([tmp_path / name], tmp_path / f"out{number}", options=OPTIONS)
        (sample,) = read_back(shards_of(tmp_path / f"out{number}"), tokenizer).values()
        assert torch.equal(sample.image.values, torch.from_numpy(picture(1)).permute(2, 0, 1))


def test_several_pictures_in_a_cell_make_a_document(tmp_path: Path, rows, tokenizer) -> None:
    row = {"image": [rows[0]["pic"], rows[1]["pic"], "media/gone.png"], "text": "two of them"}
    build_table([write_table(tmp_path / "x.jsonl", [row])], tmp_path / "out", options=OPTIONS)
    (sample,) = read_back(shards_of(tmp_path / "out"), tokenizer).values()
    first, second, text = sample.segments
    assert torch.equal(first.values, torch.from_numpy(picture(0)).permute(2, 0, 1))
    assert torch.equal(second.values, torch.from_numpy(picture(1)).permute(2, 0, 1))
    assert tokenizer.decode(text) == "two of them"
    assert left_out(tmp_path / "out")["x-00000000"][0] == "missing_file"


def test_text_alone(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": f"document {number}", "segments": [1, 2]} for number in range(4)]
    build_table([write_table(tmp_path / "x.jsonl", rows)], tmp_path / "out", options=OPTIONS)
    found = read_back(shards_of(tmp_path / "out"), tokenizer)
    assert [tokenizer.decode(s.texts[0]) for s in found.values()] == [row["text"] for row in rows]


def test_rows_that_cannot_be_used_are_listed(tmp_path: Path, rows) -> None:
    lines = [
        rows[0],
        rows[1] | {"pic": "media/gone.png"},
        rows[2] | {"pic": "https://example.com/x.png"},
        rows[3] | {"words": 5},
        rows[4] | {"id": None},
        rows[5] | {"pic": 3},
        rows[0],
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n[1]\n")
    summary = build_table([path], tmp_path / "out", CHOSEN, options=OPTIONS)
    assert summary["counts"] == {"train": 1}
    assert summary["left_out"] == {
        "bad_row": 2,
        "bad_cell": 1,
        "bad_key": 1,
        "bad_text": 1,
        "duplicate_key": 1,
        "missing_file": 1,
        "remote": 1,
    }
    assert left_out(tmp_path / "out")[f"{path}#7"][0] == "bad_row"


def test_a_csv_line_with_too_many_fields_is_listed(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text,n\na,1\nb,2,3\nc\nd,4\n")
    summary = build_table([tmp_path / "x.csv"], tmp_path / "out", options=OPTIONS)
    assert summary["counts"] == {"train": 2}
    details = [detail for _, detail in left_out(tmp_path / "out").values()]
    assert details == ["line 3: expected 2 fields, found 3", "line 4: expected 2 fields, found 1"]


def test_quotes_that_are_letters(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "x.tsv").write_text('text\tn\n"Hello," he said\t1\nsay "hi"\t2\n')
    with pytest.raises(DataError, match="--no-quotes"):
        build_table([tmp_path / "x.tsv"], tmp_path / "out", options=OPTIONS)
    build_table([tmp_path / "x.tsv"], tmp_path / "out", quotes=False, options=OPTIONS)
    found = read_back(shards_of(tmp_path / "out"), tokenizer)
    assert [tokenizer.decode(s.texts[0]) for s in found.values()] == ['"Hello," he said', 'say "hi"']


def test_heldout_rows_and_workers(tmp_path: Path, rows) -> None:
    table = write_table(tmp_path / "x.parquet", rows)
    for workers in (1, 2):
        options = BuildOptions(num_workers=workers, samples_per_shard=3, heldout=0.4)
        summary = build_table([table], tmp_path / f"out{workers}", CHOSEN, options=options)
        assert sum(summary["counts"].values()) == 8
        assert min(summary["counts"].values()) > 0
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")


def test_rows_of_one_group_are_held_out_together(tmp_path: Path, tokenizer) -> None:
    rows = [{"text": f"caption {n}", "album": f"a{n % 10}"} for n in range(40)]
    table = write_table(tmp_path / "x.jsonl", rows)
    options = BuildOptions(num_workers=1, heldout=0.5)
    build_table([table], tmp_path / "out", Columns(group="album"), options=options)
    albums = []
    for split in ("train", "heldout"):
        found = read_back(shards_of(tmp_path / "out", split), tokenizer, ("txt", "json:album"))
        albums.append({tokenizer.decode(sample.texts[1]) for sample in found.values()})
    assert albums[0]
    assert albums[1]
    assert not albums[0] & albums[1]


def test_what_json_cannot_hold(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    day = datetime.date(2024, 2, 29)
    row = {"text": "x", "nan": float("nan"), "day": day, "list": [{"raw": b"abc", "n": 1}]}
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist([row]), tmp_path / "x.parquet")
    build_table([tmp_path / "x.parquet"], tmp_path / "out", options=OPTIONS)
    with tarfile.open(shards_of(tmp_path / "out")[0]) as tar:
        facts = json.load(tar.extractfile("x-00000000.json"))  # type: ignore[arg-type]
    assert facts == {"nan": None, "day": "2024-02-29", "list": [{"raw": {"bytes_left_out": 3}, "n": 1}]}


@pytest.mark.parametrize(
    ("chosen", "words"), [(Columns(image="pict"), "no column 'pict'.*pic, snd"), (Columns(), "--image-column")]
)
def test_columns_that_are_not_there(tmp_path: Path, rows, chosen: Columns, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_table([write_table(tmp_path / "x.jsonl", rows)], tmp_path / "out", chosen, options=OPTIONS)


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.xml", "absent.csv"])
def test_files_that_are_no_tables(tmp_path: Path, name: str) -> None:
    if name != "absent.csv":
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=name):
        build_table([tmp_path / name], tmp_path / "out", options=OPTIONS)
