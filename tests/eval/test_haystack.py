"""Documents of the long-context suites: exact lengths, needles where they are said to be, answers that a reader finds in them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import book, write_shard

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.errors import ConfigError
from mmctx.eval.haystack.build import Prompt, build_prompt, least_tokens
from mmctx.eval.haystack.config import NEEDLE_KINDS, NeedleConfig, PasskeyConfig, WorldConfig
from mmctx.eval.haystack.material import named_media
from mmctx.eval.haystack.media_needles import MEDIA_KINDS, draw
from mmctx.eval.haystack.probe import Lacking, Probe, Speller, size
from mmctx.eval.haystack.sources import Haystack, Noise, Samples, Texts, open_haystack, sentences, stretch
from mmctx.eval.haystack.word_list import WordList
from mmctx.eval.suites.needle import make_kind
from mmctx.eval.suites.passkey import make_passkey
from mmctx.eval.suites.world import make_world
from mmctx.pack import pack_documents
from mmctx.train.config import RunConfig

CONFIG = NeedleConfig(candidates=4, digits=4)
PROSE = "It was late. Nobody came! Was it over? The lamp went out, and the house was still. Then the door opened.\n\nIt closed again."


@pytest.fixture
def data(tree: dict[str, Any], tmp_path: Path) -> RunData:
    write_shard(tmp_path / "pages.tar", [book(seed) for seed in range(40, 44)])
    pages = {"shards": str(tmp_path / "pages.tar"), "objectives": ["captioning"]}
    tree["eval"]["sources"] |= {"pages": pages}
    config = build_config(RunConfig, tree, "tree")
    return build_data(config.data, config.eval.sources, config.model, config.objectives, seed=0).only("captioning")


@pytest.fixture
def speller(data: RunData) -> Speller:
    return Speller(data.tokenizer)


def haystacks(data: RunData, folder: Path) -> dict[str, Haystack]:
    (folder / "prose.txt").write_text(PROSE)
    return {"noise": Noise(), "text": Texts(folder / "prose.txt"), "samples": Samples(data, ())}


def make(kind: str, data: RunData, seed: int = 0, depth: float = 0.4) -> Probe:
    rng = np.random.default_rng(seed)
    if kind == "passkey":
        return make_passkey(PasskeyConfig(candidates=4), rng, depth)
    if kind == "world":
        return make_world("before", WorldConfig(), rng, None)
    media = named_media(data, ["heldout"], 128) if kind in MEDIA_KINDS else {}
    return make_kind(kind, CONFIG, media).make(rng, depth)


def build(probe: Probe, speller: Speller, length: int, haystack: Haystack, seed: int = 0, **control: Any) -> Prompt:
    return build_prompt(probe, length, haystack, speller, np.random.default_rng(seed), **control)


@pytest.mark.parametrize("kind", [*NEEDLE_KINDS, "passkey", "world"])
def test_every_kind_has_exactly_the_tokens_it_is_to_have(
    kind: str, data: RunData, speller: Speller, tmp_path: Path
) -> None:
    for (name, haystack), seed, control in itertools.product(
        haystacks(data, tmp_path).items(), range(2), (None, "removed")
    ):
        probe = make(kind, data, seed)
        least = least_tokens(probe, speller)
        for length in (least, least + 1, least + 7, 1003):
            document = build(probe, speller, length, haystack, seed, control=control).document
            batch = pack_documents([document], speller.tokenizer.placeholder_ids)  # counts placeholders against media
            tokens = sum(batch.tokens_by_modality.values()) + len(speller.join(probe.answer))
            assert tokens == length, (name, seed, control)
            shown = {item.kind for _, item in document.media}
            if name != "samples" and control is None:
                assert ("image" in shown) == kind.startswith("picture")
                assert ("audio" in shown) == (kind.startswith("sound") or kind == "picture_sound")
    with pytest.raises(ValueError, match="needs"):
        build(probe, speller, least - 1, Noise())


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.7, 1.0])
def test_needles_stand_at_their_depth_behind_whole_sentences(
    depth: float, data: RunData, speller: Speller, tmp_path: Path
) -> None:
    for name, haystack in haystacks(data, tmp_path).items():
        for seed in range(3):
            probe = make("single", data, seed, depth)
            document, (start,) = build(probe, speller, 600, haystack, seed)
            needle = speller.join(part for part in probe.needles[0].parts if isinstance(part, str))
            np.testing.assert_array_equal(document.input_ids[start : start + len(needle)], needle)
            body = 600 - least_tokens(probe, speller)
            longest = 60  # tokens of the longest unit
            assert depth * body - longest <= start <= depth * body
            before = speller.tokenizer.decode(document.input_ids[:start])
            if name != "samples":
                assert before == "" or before[-1] in ".!?"
            if depth == 1:
                assert start == body


def test_a_reader_finds_the_answers_in_the_text(data: RunData, speller: Speller) -> None:
    """Regular expressions over the decoded document find what the references say."""
    for seed in range(4):
        for kind in ("single", "multi_key", "multi_value", "multi_query", "variable_tracking", "passkey"):
            probe = make(kind, data, seed)
            document = build(probe, speller, 900, Noise(), seed).document
            text = speller.tokenizer.decode(document.input_ids)
            body, question = text[: text.rindex("What" if "What" in text else "Find")], text
            stated = re.findall(r"magic numbers for (\S+) is: (\d+)\.", body)
            if kind in ("single", "multi_key"):
                key = re.search(r"magic number for (\S+)\?", question)[1]  # type: ignore[index]
                assert [number for name, number in stated if name == key] == list(probe.references)
                assert len(stated) == (1 if kind == "single" else 4)
            elif kind == "multi_value":
                assert [number for _, number in stated] == list(probe.references)
            elif kind == "multi_query":
                asked = re.search(r"magic numbers for (\S+), (\S+) and (\S+)\? The special", question)
                assert asked
                assert tuple(dict(stated)[key] for key in asked.groups()) == probe.references
            elif kind == "variable_tracking":
                value = re.search(r"assigned the value (\d+)", question)[1]  # type: ignore[index]
                held: dict[str, str] = {}
                for variable, number, source in re.findall(r"VAR (\w+) = (?:(\d+)|VAR (\w+))\.", body):
                    held[variable] = number or held[source]
                assert len(held) == 6
                assert [name for name, number in held.items() if number == value] == list(probe.references)
            else:
                assert set(re.findall(r"\d+", body)) == {probe.references[0]}
            assert len(probe.choices[0].candidates) == 4 * len(probe.references)
            right = [probe.choices[0].candidates[n].strip() for n in probe.choices[0].right]
            assert right == list(probe.references)


@pytest.mark.parametrize("kind", ["common_words", "frequent_words"])
def test_asked_words_are_the_commonest_of_the_document(kind: str, data: RunData, speller: Speller) -> None:
    for seed, length in itertools.product(range(3), (900, 1600)):
        probe = make(kind, data, seed)
        document = build(probe, speller, length, Noise(), seed).document
        body = speller.tokenizer.decode(document.input_ids[: -speller.count(probe.question)])
        counts = Counter(word for word in body.replace("-", "_").split() if "_" not in word and word.islower())
        for word in "grass is green sky blue sun yellow we go back again".split():  # noqa: SIM905
            counts.pop(word, None)
        counts = Counter({word: n for word, n in counts.items() if not word.endswith(".")})
        commonest = counts.most_common(4)
        assert {word for word, _ in commonest[:3]} == set(probe.references)
        assert commonest[2][1] > commonest[3][1]
        gone = build(probe, speller, length, Noise(), seed, control="removed").document
        words = Counter(speller.tokenizer.decode(gone.input_ids[: -speller.count(probe.question)]).split())
        of_candidates = [words[word.strip()] for word in probe.choices[0].candidates]
        assert max(of_candidates) - min(of_candidates) <= 1  # one may stand in the filler before the list, too


def shown_between(prompt: Prompt, start: int, end: int) -> list[Any]:
    return [item for at, item in prompt.document.media if start <= at < end]


def test_pictures_and_clips_carry_the_answers(data: RunData, speller: Speller) -> None:
    media = named_media(data, ["heldout"], 128)
    # Named items are decoded anew in every reading: compare what they hold.
    for seed, (kind, modality) in itertools.product(range(3), (("picture", "image"), ("sound", "audio"))):

        def name_of(item: Any, modality: str = modality) -> str:
            (found,) = [one.name for one in media[modality] if one.item.values.equal(item.values)]
            return found

        prompt = build(make(kind, data, seed), speller, 700, Noise(), seed)
        (item,) = shown_between(prompt, 0, 700)
        assert (name_of(item),) == make(kind, data, seed).references

        probe = make(f"{kind}_value", data, seed)
        prompt = build(probe, speller, 900, Noise(), seed)
        key = re.search(r"of (\S+?)(?: show)?\?", probe.question[0])[1]  # type: ignore[arg-type, index]
        asked = [n for n, needle in enumerate(probe.needles) if f"of {key}:" in needle.parts[0]]  # type: ignore[operator]
        assert [name_of(probe.needles[n].parts[1]) for n in asked] == list(probe.references)
        (item,) = shown_between(prompt, prompt.starts[asked[0]], prompt.starts[asked[0]] + 40)[:1]
        assert name_of(item) == probe.references[0]

        probe = make(f"{kind}_key", data, seed)
        (shown,) = [part for part in probe.question if not isinstance(part, str)]
        beside = [needle.parts[3] for needle in probe.needles if needle.parts[1].values.equal(shown.values)]  # type: ignore[union-attr]
        assert beside == [f" {probe.references[0]}"]

        probe = make(f"{kind}_count", data, seed)
        prompt = build(probe, speller, 1200, Noise(), seed)
        counted = Counter(id(item) for _, item in prompt.document.media)
        in_order = [counted[id(item)] for item in {id(item): item for _, item in prompt.document.media}.values()]
        assert tuple(map(str, in_order)) == probe.references
        assert [len(choice.lead) for choice in probe.choices] == [0, 2, 4]


def test_a_chain_leads_from_the_key_over_the_picture_to_the_clip(data: RunData) -> None:
    media = named_media(data, ["heldout"], 128)
    for seed in range(5):
        probe = make("picture_sound", data, seed)
        key = probe.question[0].split()[-3].rstrip("?")  # type: ignore[union-attr]
        (picture,) = [n.parts[1] for n in probe.needles if n.parts[0] == f" The picture of {key}:"]
        (clip,) = [n.parts[3] for n in probe.needles if n.parts[0] == " To this picture" and n.parts[1] is picture]
        (name,) = [one.name for one in media["audio"] if one.item.values.equal(clip.values)]  # type: ignore[union-attr]
        assert (name,) == probe.references


def test_controls_hold_nothing_or_only_what_is_asked(data: RunData, speller: Speller) -> None:
    for kind in ("single", "multi_key", "multi_query", "passkey", "picture_value", "sound_count"):
        probe = make(kind, data)
        removed = build(probe, speller, 900, Noise(), control="removed")
        text = speller.tokenizer.decode(removed.document.input_ids[: -speller.count(probe.question)])
        assert not removed.starts
        assert not removed.document.media
        assert not any(reference in text for reference in probe.references)
        alone = build(probe, speller, 900, Noise(), control="alone").document
        asked = [part for needle in probe.needles if needle.asked for part in needle.parts]
        assert len(alone.input_ids) == speller.count(asked) + speller.count(probe.question)


def test_the_haystack_does_not_name_the_candidates(data: RunData, speller: Speller) -> None:
    haystack = Samples(data, ("heldout",))
    probe = make("picture", data)
    document = build(probe, speller, 900, haystack).document
    text = speller.tokenizer.decode(document.input_ids[: -speller.count(probe.question)])
    assert len(document.media) > 5  # pictures and clips of other samples
    for candidate in probe.choices[0].candidates:
        assert not re.search(rf"\b{candidate.strip()}\b", text)


def test_documents_depend_on_their_seed_alone(data: RunData, speller: Speller) -> None:
    def ids(seed: int) -> bytes:
        return build(make("multi_key", data, seed), speller, 500, Samples(data, ()), seed).document.input_ids.tobytes()

    assert ids(1) == ids(1)
    assert len({ids(seed) for seed in range(20)}) == 20


def test_candidates_come_in_random_order(data: RunData) -> None:
    places = Counter(make("single", data, seed).choices[0].right[0] for seed in range(400))
    assert set(places) == set(range(4))
    assert max(places.values()) < 140


def test_too_few_names_are_said(data: RunData) -> None:
    media = named_media(data, [], 128)
    with pytest.raises(Lacking, match=r"needs 99 pictures .* have \d+"):
        draw(media["image"], 99, np.random.default_rng(0), "pictures")
    chosen = [one.name for one in draw(media["image"], 6, np.random.default_rng(0), "pictures")]
    assert not any(a != b and b.startswith(a) for a in chosen for b in chosen)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(2, 8), st.integers(0, 500), st.integers(0, 99))
def test_word_lists_are_clear_in_any_room(asked: int, candidates: int, spare: int, seed: int) -> None:
    words = [f"w{n}" for n in range(asked * candidates)]
    weights = (np.arange(len(words)) + 1.0) ** -2
    chosen = WordList(dict(zip(words, (weights / weights.sum()).tolist(), strict=True)), tuple(words[:asked]))

    def cost(word: str) -> int:
        return len(word)

    room = chosen.least_tokens(cost) + spare
    drawn = Counter(chosen.drawn(room, cost, np.random.default_rng(seed)))
    assert sum(count * cost(word) for word, count in drawn.items()) <= room
    assert min(drawn[word] for word in chosen.asked) > max(drawn[word] for word in words[asked:])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.integers(0, 99))
def test_stretches_are_exact_whatever_stands_in_them(room: int, seed: int) -> None:
    from mmctx.pack import MediaItem

    class Letters:
        def encode(self, text: str) -> np.ndarray:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int64)

    rng = np.random.default_rng(seed)
    picture = MediaItem("image", None, 17)  # type: ignore[arg-type]
    units = (picture if rng.random() < 0.5 else " a sentence." for _ in itertools.count())
    taken = stretch(units, room, Speller(Letters()))  # type: ignore[arg-type]
    assert sum(map(size, taken)) == room


def test_texts_are_read_from_files_and_folders(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.txt").write_text("One. Two\nthree.")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("Four?")
    assert Texts(tmp_path).sentences == [" One.", " Two three.", " Four?"]
    assert sentences(PROSE)[1] == "Nobody came!"
    with pytest.raises(ConfigError, match=r"nothing' holds no text; give a text file"):
        Texts(tmp_path / "nothing")


def test_unknown_sources_are_errors(data: RunData) -> None:
    with pytest.raises(ConfigError, match=r"'books' is none of eval\.sources"):
        open_haystack(NeedleConfig(haystack={"kind": "samples", "sources": ["books"]}).haystack, data)  # type: ignore[arg-type]
