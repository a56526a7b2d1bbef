"""Long texts become documents, whole or in parts."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from reading import left_out, read_back, shards_of

from mmctx.datasets.build.html import Picture, read_page
from mmctx.datasets.build.text import build_text
from mmctx.datasets.build.writer import BuildOptions
from mmctx.errors import ConfigError, DataError

OPTIONS = BuildOptions(num_workers=1, samples_per_shard=2)


def texts(out: Path, tokenizer) -> dict[str, str]:
    found = read_back(shards_of(out), tokenizer)
    return {key: tokenizer.decode(sample.texts[0]) for key, sample in found.items()}


def test_files_of_a_folder(tmp_path: Path, tokenizer) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_bytes("﻿first\r\nlines".encode())
    (folder / "sub" / "b.md").write_text("second")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (folder / "d.html").write_text("<title>t</title><p>fourth</p><p>and <i>more</i></p>")
    (folder / "latin.txt").write_bytes("né".encode("latin-1"))
    (folder / "e.pdf").write_bytes(b"%PDF")
    build_text([folder], tmp_path / "out", options=OPTIONS)
    assert texts(tmp_path / "out", tokenizer) == {
        "a": "first\nlines",
        "sub/b%2Emd": "second",
        "c": "third",
        "d%2Ehtml": "fourth\n\nand more",
    }
    reasons = {key: reason for key, (reason, _) in left_out(tmp_path / "out").items()}
    assert reasons == {"latin.txt": "bad_text", "e.pdf": "unsupported_format"}


def test_encodings(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "x.txt").write_bytes("né".encode("latin-1"))
    build_text([tmp_path / "x.txt"], tmp_path / "out", encoding="latin-1", options=OPTIONS)
    assert texts(tmp_path / "out", tokenizer) == {"x": "né"}


@pytest.mark.parametrize(
    ("cut", "content", "expected"),
    [
        ("form-feed", "one\ftwo\f \fthree", ["one", "two", "three"]),
        ("heading", "intro\n# A\na\n### not\n## B\nb #c\n", ["intro\n", "# A\na\n### not\n", "## B\nb #c\n"]),
        ("file", "one\ftwo", ["one\ftwo"]),
    ],
)
def test_cuts(tmp_path: Path, tokenizer, cut, content, expected) -> None:
    (tmp_path / "x.txt").write_text(content)
    summary = build_text([tmp_path / "x.txt"], tmp_path / "out", cut=cut, options=OPTIONS)
    assert list(texts(tmp_path / "out", tokenizer).values()) == expected
    assert summary["words"] == sum(len(part.split()) for part in expected)
    assert build_text([tmp_path / "x.txt"], tmp_path / "out", cut=cut, options=OPTIONS)["written"] == []


def test_parts_of_a_file_are_held_out_together(tmp_path: Path, tokenizer) -> None:
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("\f".join(f"part {n}" for n in range(3)))
    files = sorted(tmp_path.glob("*.txt"))
    options = BuildOptions(num_workers=1, heldout=0.4)
    summary = build_text(files, tmp_path / "out", cut="form-feed", options=options)
    assert min(summary["counts"].values()) > 0
    files_of = [
        {key.split("/")[0] for key in read_back(shards_of(tmp_path / "out", split), tokenizer)}
        for split in ("train", "heldout")
    ]
    assert not files_of[0] & files_of[1]


def test_wrong_arguments(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(ConfigError, match="cut"):
        build_text([tmp_path / "x.txt"], tmp_path / "out", cut="page", options=OPTIONS)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="klingon"):
        build_text([tmp_path / "x.txt"], tmp_path / "out", encoding="klingon", options=OPTIONS)
    with pytest.raises(DataError, match=r"absent\.txt"):
        build_text([tmp_path / "absent.txt"], tmp_path / "out", options=OPTIONS)


@pytest.mark.parametrize(
    ("html", "parts"),
    [
        ("<p>a<img src=x alt=y>b</p>", ["a", Picture("x", "y"), "b"]),
        ("<p>a <b>b</b> c</p>", ["a b c"]),
        ("<p>a<b> b</b>c</p>", ["a bc"]),
        ("<tr><td>1</td><td>2</td></tr><tr><td>3</td></tr>", ["1 2\n3"]),
        ("<ul><li>a</li><li><p>b</p></li></ul>c", ["- a\n- b\n\nc"]),
        ("<style>x</style>a&amp;&nbsp;b<br>c", ["a& b\nc"]),
        ("<div class='skip'><div>no</div><img src=no></div>yes", ["yes"]),
        ("<pre>a\n  b</pre> c", ["a\n  b\n\nc"]),
    ],
)
def test_what_a_page_says(html: str, parts: list) -> None:
    assert read_page(html, ("skip",)).parts == parts
