"""The tar reader against Python's tarfile and the webdataset library."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from make_shards import make_triples, write_shard
from webdataset.tariterators import base_plus_ext

from mmctx.datasets.shards.tar import BLOCK, group_samples, parse_members, quick_members, scan_tar, split_name
from mmctx.errors import DataError, SampleError


def write_tar(path: Path, files: list[tuple[str, bytes]], format: int) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def assert_like_tarfile(path: Path) -> None:
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
        contents = [archive.extractfile(m).read() for m in archive if m.isreg()]  # type: ignore[union-attr]
    found = list(scan_tar(path))
    assert [(m.name, m.offset, m.size) for m in found] == expected
    assert [data[m.offset : m.offset + m.size] for m in found] == contents


FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


@pytest.mark.parametrize("format", FORMATS)
def test_members_equal_tarfile(tmp_path, format):
    files = [
        ("a.txt", b"x"),
        ("empty.txt", b""),
        ("d" * 90 + "/" + "e" * 80 + ".jpg", b"y" * 513),  # needs the ustar prefix or a long name
        ("block.bin", b"z" * BLOCK),
    ]
    if format != tarfile.USTAR_FORMAT:
        files += [("l" * 300 + ".png", b"long"), ("名字/日本.txt", b"unicode"), ("after.txt", b"short again")]
    assert_like_tarfile(write_tar(tmp_path / "x.tar", files, format))


def test_other_kinds_of_entries_are_skipped(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as archive:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link.txt"), (tarfile.FIFOTYPE, "pipe.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "k" * 200 if kind == tarfile.SYMTYPE else ""
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("a.txt"))
    assert [m.name for m in scan_tar(path)] == ["a.txt"]
    assert_like_tarfile(path)


def test_sizes_in_base_256_and_pax(tmp_path):
    info = tarfile.TarInfo("big.txt")
    info.size = 5
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"\x80" + (5).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    pax = tarfile.TarInfo("pax.txt")
    pax.pax_headers, pax.size = {"size": "3", "mtime": "1.5"}, 3
    path = tmp_path / "x.tar"
    path.write_bytes(
        bytes(block) + b"hello".ljust(BLOCK, b"\0") + pax.tobuf(tarfile.PAX_FORMAT) + b"abc".ljust(1536, b"\0")
    )
    assert [(m.name, m.size) for m in scan_tar(path)] == [("big.txt", 5), ("pax.txt", 3)]
    assert_like_tarfile(path)


def test_the_prefix_field_of_old_gnu_archives_is_no_prefix(tmp_path):
    block = bytearray(tarfile.TarInfo("a.txt").tobuf(tarfile.GNU_FORMAT))
    block[345:357] = b"14712345670\0"  # the access time
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    (tmp_path / "x.tar").write_bytes(block)
    assert [m.name for m in scan_tar(tmp_path / "x.tar")] == ["a.txt"]


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_range_of_a_sample_holds_its_long_name(tmp_path, format):
    key = "k" * 200
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"1"), (f"{key}.jpg", b"2"), (f"{key}.txt", b"3")], format)
    _, sample = group_samples(scan_tar(path))
    data = path.read_bytes()[sample.start : sample.end]
    assert parse_members(data, key=key) == {"jpg": b"2", "txt": b"3"}


def test_a_pax_size_belongs_to_the_member_not_to_headers_between(tmp_path):
    pax = tarfile.TarInfo("a.txt")
    pax.pax_headers, pax.size = {"size": "3"}, 3
    records, header = pax.tobuf(tarfile.PAX_FORMAT)[:-BLOCK], pax.tobuf(tarfile.PAX_FORMAT)[-BLOCK:]
    link = tarfile.TarInfo._create_gnu_long_header("k" * 600, tarfile.GNUTYPE_LONGLINK, "utf-8", "strict")  # type: ignore[attr-defined]
    path = tmp_path / "x.tar"
    path.write_bytes(records + link + header + b"abc".ljust(BLOCK, b"\0"))
    assert [(m.name, m.size) for m in scan_tar(path)] == [("a.txt", 3)]


name_parts = st.text(st.characters(codec="utf-8", exclude_characters="/\0\n\r", exclude_categories=["Cs"]), min_size=1)


@given(
    files=st.lists(
        st.tuples(
            st.lists(name_parts.filter(lambda p: p not in (".", "..")), min_size=1, max_size=4).map("/".join),
            st.integers(0, 1500),
        ),
        max_size=5,
    ),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
@settings(max_examples=30, deadline=None)
@pytest.mark.slow
def test_any_names_and_sizes_come_back(tmp_path_factory, files, format):
    path = tmp_path_factory.getbasetemp() / "any-names.tar"
    write_tar(path, [(name, bytes([n % 251]) * size) for n, (name, size) in enumerate(files)], format)
    assert [(m.name, m.size) for m in scan_tar(path)] == files


@given(st.lists(st.text("ab.", min_size=1, max_size=5), min_size=1, max_size=3).map("/".join))
@settings(max_examples=100, deadline=None)
def test_keys_equal_webdataset(name):
    key, extension = base_plus_ext(name)
    hidden = name.rpartition("/")[2].startswith(".")  # webdataset takes d/.txt for a sample with the key "d/"
    assert split_name(name) == (None if key is None or hidden else (key, extension.lower()))


def test_metadata_and_hidden_files_belong_to_no_sample():
    assert split_name("a/b.Left.PNG") == ("a/b", "left.png")
    assert [split_name(n) for n in ("__meta__/x.json", "__x__", "a/._b.jpg", "README", "a.d/b")] == [None] * 5


def test_samples_equal_webdataset(tmp_path):
    path = write_shard(tmp_path / "x.tar", make_triples(5))
    data = path.read_bytes()
    expected = list(webdataset.WebDataset(str(path), shardshuffle=False))
    samples = list(group_samples(scan_tar(path)))
    assert [s.key for s in samples] == [s["__key__"] for s in expected]
    for sample, other in zip(samples, expected, strict=True):
        members = parse_members(data[sample.start : sample.end], key=sample.key)
        assert members == {k: v for k, v in other.items() if not k.startswith("__")}


@pytest.mark.parametrize("format", FORMATS)
def test_every_cut_is_noticed(tmp_path, format):
    whole = write_tar(tmp_path / "x.tar", [("a.txt", b"x" * 700), ("n" * 90 + ".txt", b"y" * 300)], format).read_bytes()
    ends = [m.offset + -(-m.size // BLOCK) * BLOCK for m in scan_tar(tmp_path / "x.tar")]
    cut = tmp_path / "cut.tar"
    for length in range(100, ends[-1], 100):
        if any(0 <= end - length < BLOCK for end in ends):
            continue  # only padding is missing
        cut.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"cut\.tar: offset \d+: .*(found \d+|found the end)"):
            list(scan_tar(cut))


def test_a_cut_names_offset_and_both_sizes(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x" * 700)], tarfile.USTAR_FORMAT)
    path.write_bytes(path.read_bytes()[: BLOCK + 123])
    with pytest.raises(
        DataError, match=r"offset 512: member 'a\.txt' should have 700 bytes, found 123; .*write it again"
    ):
        list(scan_tar(path))


def test_damage_is_noticed(tmp_path):
    path = write_tar(tmp_path / "x.tar", [("a.txt", b"x"), ("b.txt", b"y")], tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[2 * BLOCK] ^= 1  # one bit of the second name
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"offset 1024: header checksum should be \d+, found \d+"):
        list(scan_tar(path))


def test_what_is_no_tar(tmp_path):
    with pytest.raises(DataError, match="no such shard"):
        list(scan_tar(tmp_path / "none.tar"))
    (tmp_path / "empty.tar").touch()
    with pytest.raises(DataError, match="found 0 bytes"):
        list(scan_tar(tmp_path / "empty.tar"))
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for number in range(20):
            archive.addfile(tarfile.TarInfo(f"{number * 7919}.txt"))
    (tmp_path / "x.tar.gz").write_bytes((tmp_path / "x.tar.gz").read_bytes().ljust(2 * BLOCK, b"\1"))
    with pytest.raises(DataError, match="a compressed shard must be decompressed"):
        list(scan_tar(tmp_path / "x.tar.gz"))


def test_parse_members_refuses_other_keys_and_duplicates(tmp_path):
    data = write_tar(tmp_path / "x.tar", [("a.txt", b"x"), ("a.TXT", b"y")], tarfile.USTAR_FORMAT).read_bytes()
    with pytest.raises(SampleError, match=r"duplicate_member: .*'txt'"):
        parse_members(data)
    with pytest.raises(DataError, match="expected members of 'b', found 'a'"):
        parse_members(data, key="b")
    with pytest.raises(DataError, match="expected members of 'b', found none"):
        parse_members(bytes(1024), key="b")


@pytest.mark.parametrize("format", FORMATS)
@given(
    key=st.text("ab/é", min_size=1, max_size=120).map(lambda text: f"k{text}k"),
    members=st.dictionaries(st.sampled_from(["txt", "left.png", "JPG", "d/txt"]), st.binary(max_size=700), min_size=1),
    mtime=st.sampled_from([0, 1.5]),
)
@settings(max_examples=60, deadline=None)
def test_quick_members_reads_the_same_or_leaves_it_to_parse_members(tmp_path_factory, format, key, members, mtime):
    path = tmp_path_factory.getbasetemp() / "quick.tar"
    with tarfile.open(path, "w", format=format) as archive:
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mtime = len(data), mtime
            try:
                archive.addfile(info, io.BytesIO(data))
            except ValueError:  # this format has no room for the name
                return
    for sample in group_samples(scan_tar(path)):
        data = path.read_bytes()[sample.start : sample.end]
        found = quick_members(data, sample.key.encode())
        assert found in (None, parse_members(data, key=sample.key))
        if len(key) < 40 and key.isascii() and "d/txt" not in members:
            assert found is not None, "the ordinary case must be the quick one"


def test_quick_members_leaves_all_else_to_parse_members(tmp_path):
    data = write_tar(tmp_path / "x.tar", [("a.txt", b"x"), ("a.TXT", b"y")], tarfile.USTAR_FORMAT).read_bytes()
    one = data[: BLOCK + 1]
    assert quick_members(one, b"a") == {"txt": b"x"}
    wrong_size = bytearray(one)
    wrong_size[124:135] = b"-0000000777"
    renamed = tarfile.TarInfo("a.txt")
    renamed.pax_headers = {"path": "b.txt"}
    other_kind = tarfile.TarInfo("a.txt")
    other_kind.type = tarfile.SYMTYPE
    for bad, key in [
        (data[: 3 * BLOCK + 1], b"a"),  # the extension twice
        (one, b"b"),
        (one[:-1], b"a"),
        (one[:400], b"a"),
        (bytes(1024), b"a"),
        (b"", b"a"),
        (bytes(wrong_size), b"a"),
        (renamed.tobuf(tarfile.PAX_FORMAT), b"a"),
        (other_kind.tobuf(tarfile.USTAR_FORMAT), b"a"),
    ]:
        assert quick_members(bad, key) is None
    with pytest.raises(DataError, match=r"header number should be octal, found b'-0000000777"):
        parse_members(bytes(wrong_size))
