"""Knowledge graphs: each format against what is written in it, WordNet against its own index."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import png, write_shard

from mmctx.errors import DataError
from mmctx.store.entries import Part, Triple
from mmctx.store.graphs import Fact, documents, pictures_by_name, read_graph, verbalise
from mmctx.store.read import Inputs
from mmctx.store.wordnet import MEANS

WORDNET = Path("/usr/share/wordnet")

# Four synsets in WordNet's own format: dog -> canine (kind), dog part of pack, hot <-> cold (lexical, of their second words), to bark.
FILES = {
    "data.noun": """  1 This is a licence.
00000100 05 n 02 dog 0 domestic_dog 0 002 @ 00000200 n 0000 #m 00000300 n 0000 | a tame canine
00000200 05 n 01 canine 0 001 ~ 00000100 n 0000 | an animal with fangs
00000300 05 n 01 pack 0 001 %m 00000100 n 0000 |
""",
    "data.verb": "00000400 29 v 01 bark 0 000 01 + 02 00 | make barking sounds\n",
    "data.adj": """00000500 00 a 02 warm 0 hot(p) 0 001 ! 00000600 a 0202 | of heat
00000600 00 s 02 cool 0 cold 0 001 ! 00000500 a 0202 | without heat
""",
    "data.adv": "",
}


@pytest.fixture
def small_wordnet(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    return tmp_path


def test_wordnet_by_hand(small_wordnet: Path) -> None:
    found = [verbalise(triple) for _, triple in read_graph(small_wordnet, "wordnet")]
    assert found == [
        "dog means a tame canine.",
        "dog is a kind of canine.",
        "dog is a member of pack.",
        "canine means an animal with fangs.",
        "bark means make barking sounds.",
        "warm means of heat.",
        "hot is the opposite of cold.",
        "cool means without heat.",
        "cold is the opposite of hot.",
    ]
    nouns = list(read_graph(small_wordnet / "data.noun", "wordnet"))
    assert [id for id, _ in nouns][:2] == ["wordnet:noun:00000100:means", "wordnet:noun:00000100:@:noun:00000200:0000"]


def test_wordnet_errors(small_wordnet: Path, tmp_path: Path) -> None:
    (small_wordnet / "data.verb").write_text("00000400 29 v zz bark\n")
    with pytest.raises(DataError, match=r"data.verb: line 1: not in WordNet's format"):
        list(read_graph(small_wordnet, "wordnet"))
    (small_wordnet / "data.verb").unlink()
    with pytest.raises(DataError, match=r"data.verb: missing"):
        list(read_graph(small_wordnet, "wordnet"))
    with pytest.raises(DataError, match="apt-get install wordnet-base"):
        list(read_graph(tmp_path / "none", "wordnet"))


@pytest.mark.slow
def test_wordnet_itself() -> None:
    if not (WORDNET / "data.noun").is_file():
        pytest.skip("apt-get install wordnet-base")
    facts = list(read_graph(WORDNET, "wordnet"))
    glosses = sum(triple.relation == MEANS for _, triple in facts)
    synsets = sum(
        not line.startswith("  ") for p in WORDNET.glob("data.*") for line in p.open(encoding="utf-8", errors="replace")
    )
    assert glosses == synsets == 117_659  # WordNet 3.0, as its own statistics say
    said = {verbalise(triple) for _, triple in facts}
    for fact in (
        "dog is a kind of canine.",
        "hot is the opposite of cold.",
        "Paris is an instance of national capital.",
    ):
        assert fact in said
    assert len({id for id, _ in facts}) > 0.9999 * len(facts)  # a few pointers stand twice in the files


def test_ntriples(tmp_path: Path) -> None:
    path = tmp_path / "graph.nt"
    path.write_text(
        "# a comment\n\n"
        "<http://x.org/Ada_Lovelace> <http://x.org/ontology#birthPlace> <http://x.org/London> .\n"
        '<http://x.org/caf%C3%A9> <http://x.org/label> "a \\"caf\\u00E9\\"\\n"@fr . # says so\n'
        '_:b1 <http://x.org/age> "36"^^<http://www.w3.org/2001/XMLSchema#integer> .\n',
        encoding="utf-8",
    )
    assert [triple for _, triple in read_graph(path, "ntriples")] == [
        Triple("Ada_Lovelace", "birthPlace", "London"),
        Triple("café", "label", 'a "café"\n'),
        Triple("_:b1", "age", "36"),
    ]
    assert verbalise(Triple("Ada_Lovelace", "birthPlace", "London")) == "Ada Lovelace birth place London."
    path.write_text("<http://x.org/a> <http://x.org/b> .\n")
    with pytest.raises(DataError, match=r"graph.nt: line 1: expected <subject> <relation> <object>"):
        list(read_graph(path, "ntriples"))


def test_tables_of_triples(tmp_path: Path) -> None:
    path = tmp_path / "graph.tsv"
    path.write_text("the moon\tis made of\tcheese\n# no\nthe sun\tis\thot\n")
    facts = list(read_graph(path, "tsv"))
    assert [triple for _, triple in facts] == [
        Triple("the moon", "is made of", "cheese"),
        Triple("the sun", "is", "hot"),
    ]
    path.write_text("the moon\tis made of cheese\n")
    with pytest.raises(DataError, match="line 1: expected subject TAB relation TAB object, found 'the moon"):
        list(read_graph(path, "tsv"))


def test_pictures_come_along(tmp_path: Path) -> None:
    shard = write_shard(
        tmp_path / "pictures.tar",
        [{"__key__": "1", "png": png(1), "txt": b"Domestic dog"}, {"__key__": "2", "png": png(2), "txt": b"fish"}],
    )
    pictures = pictures_by_name(Inputs(str(shard)))
    facts = [
        Fact("a", Triple("domestic_dog", "is", "tame")),
        Fact("b", Triple("cat", "is", "wild")),
        Fact("c", Triple("cat", "has", "fur")),
    ]
    found = list(documents(facts, "graph", pictures, relations=["IS"], prefix="g/"))
    assert [(document.id, len(document.parts)) for document in found] == [("g/a", 2), ("g/b", 1)]
    assert found[0].parts == (Part("image", media=png(1)), Part("text", "domestic dog is tame."))
    assert (found[0].triple, found[0].source) == (Triple("domestic_dog", "is", "tame"), "graph")
