"""Pictures with captions from shards to training tensors (bar C5): one process, ours against open_clip and Megatron-Energon.

    python benchmarks/image_text.py [--json] [--quick] [--repeats 3]

Every side reads the same shards of 500 x 375 JPEGs with captions, makes 224 x 224 pictures by antialiased bicubic resizing, and tokens of
CLIP's vocabulary. One difference is left: the peers cut a random 90 to 100% of a picture (open_clip's default), we cut its central
square, which is a fifth fewer pixels to resize and the same number to decode. "float" is normalised on the host as theirs, "uint8" leaves
that to the device, as our encoder does. First it is asserted that token ids are equal and that pixels agree with open_clip's own
evaluation transform. "build" is everything up to a pipeline (imports and the index are left out), "first batch" what follows: open_clip
reads 1,000 samples for its shuffling first, we need only those of the batch.

The peers run in environments of their own under `.bench`, made at the first call.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine, parse, peer_python, report, run_peer, versions, write_photos

SIDES = Path(__file__).parent / "sides"
PEERS = {  # name: (script, packages, module that shows that they are there)
    "open_clip": ("open_clip_side.py", ["webdataset==0.2.86", "pandas"], "open_clip_train.data"),
    "energon": ("energon_side.py", ["megatron-energon==7.4.1"], "megatron.energon"),
}
BARS = {"float": 2.0, "uint8": 2.8, "first_batch": 0.5}
"""Against open_clip: times its rate, times its rate, our seconds to the first batch over its."""


def write_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer, from the vocabulary that open_clip ships, in the layout that Transformers loads."""
    from open_clip.tokenizer import SimpleTokenizer
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    theirs = SimpleTokenizer()
    merges = sorted(theirs.bpe_ranks, key=theirs.bpe_ranks.__getitem__)
    tokenizer = Tokenizer(models.BPE(theirs.encoder, merges, end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end_of_text>")
    fast.save_pretrained(str(folder))


def check_equal(folder: Path, batch_size: int) -> float:
    """Equal token ids and, up to rounding, pixels; returns the mean difference of pixels in levels of 255."""
    import open_clip
    from our_side import build
    from PIL import Image

    from mmctx.datasets.decode import decode_image

    data = build(folder, batch_size)
    source, _ = data.dataset.sources[0]
    tokenize = open_clip.SimpleTokenizer()
    transform = open_clip.image_transform(224, is_train=False, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    make_image = data.dataset.tables[0].preprocessors.image
    assert make_image is not None
    differences = []
    for number in range(0, source.num_samples, max(1, source.num_samples // 40)):
        members = source.read(number).members
        text = members["txt"].decode()
        assert data.tokenizer.encode(text).tolist() == tokenize.encode(text), text
        ours = make_image(decode_image(members["jpg"])).values
        theirs = transform(Image.open(io.BytesIO(members["jpg"]))) * 255  # type: ignore[operator]
        differences.append(float((ours - theirs).abs().mean()))
    difference = sum(differences) / len(differences)
    assert difference < 2, f"pixels differ by {difference:.2f} levels on average"
    return difference


def sides(arguments: list[str]) -> tuple[dict[str, Callable[[], dict[str, Any]]], dict[str, str]]:
    """What can run here, and why the rest cannot."""
    ours = SIDES / "our_side.py"
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        kind: lambda kind=kind: run_peer(Path(sys.executable), ours, *arguments, kind) for kind in ("float", "uint8")
    }
    skipped = {}
    for name, (script, packages, module) in PEERS.items():
        try:
            python = peer_python(name, packages, module)
        except RuntimeError as error:
            skipped[name] = str(error)
            continue
        runs[name] = lambda python=python, script=script: run_peer(python, SIDES / script, *arguments)
    return runs, skipped


def compare(found: dict[str, list[dict[str, Any]]], peer: str, by: str) -> dict[str, float]:
    """Ratios to a peer, of the best turn of each side: times its rate; our seconds over its."""

    def best(side: str, *stretches: str) -> float:
        return min(sum(turn[name][by] for name in stretches) for turn in found[side])

    return {
        "float": round(best(peer, "sample") / best("float", "sample"), 2),
        "uint8": round(best(peer, "sample") / best("uint8", "sample"), 2),
        "first_batch": round(best("uint8", "first_batch") / best(peer, "first_batch"), 2),
        "build_and_first_batch": round(best("uint8", "build", "first_batch") / best(peer, "build", "first_batch"), 2),
    }


def main() -> None:
    arguments = parse(__doc__, repeats=3)
    samples, shards, batch, steady = (64, 2, 8, 16) if arguments.quick else (2_048, 4, 64, 384)
    sys.path.insert(0, str(SIDES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, samples, shards, different=100)
        write_tokenizer(folder / "tokenizer")
        difference = check_equal(folder, batch)  # indexes the shards as well
        runs, skipped = sides([str(value) for value in (folder, shards, samples, batch, steady)])
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in runs}
        for _ in range(arguments.repeats):
            for side, run in runs.items():
                found[side].append(run())
    best = {
        side: {name: min(turn[name]["clock"] for turn in turns) for name in ("build", "first_batch", "sample")}
        for side, turns in found.items()
    }
    result = {
        "samples_per_second": {side: round(1 / seconds["sample"], 1) for side, seconds in best.items()},
        "build_seconds": {side: round(seconds["build"], 3) for side, seconds in best.items()},
        "first_batch_seconds": {side: round(seconds["first_batch"], 3) for side, seconds in best.items()},
        "against": {
            peer: {by: compare(found, peer, by) for by in ("clock", "processor")} for peer in PEERS if peer in found
        },
        "pixel_difference": round(difference, 3),
        "skipped": skipped,
        "bars": BARS,
        "machine": machine(),
        "versions": versions("open_clip_torch", "pillow", "torch", "mmctx"),
    }
    lines = [f"pixels differ from open_clip's evaluation transform by {difference:.2f} of 255 levels on average"]
    for side, rate in result["samples_per_second"].items():
        built, first = result["build_seconds"][side], result["first_batch_seconds"][side]
        lines.append(f"{side:<10} {rate:7.1f} samples/s, built in {built:.2f} s, first batch {first:.2f} s later")
    for peer, ratios in result["against"].items():
        for by, ratio in ratios.items():
            lines.append(f"against {peer}, by the {by}: {json.dumps(ratio)}")
    lines += [f"{peer} left out: {reason}" for peer, reason in skipped.items()]
    report(result, lines, arguments.json)


if __name__ == "__main__":
    main()
