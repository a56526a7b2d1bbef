"""One emoji -> one sample: picture, name, speech and facts.

Runs in worker processes, so nothing here may import torch (nor webdataset, which does).
"""

from __future__ import annotations

import io
import json

import soundfile
from PIL import Image

from mmctx.datasets.build.catalogue import Emoji, demo_package, keyed_hash
from mmctx.datasets.build.espeak import SAMPLE_RATE, VOICES, speak


def render_sample(emoji: Emoji, seed: int, image_size: int) -> dict[str, str | bytes]:
    """The members of one WebDataset sample: ``__key__``, ``png``, ``txt``, ``flac`` and ``json``.

    Raises:
        DataError: a package of the demo is missing or the name cannot be spoken.
    """
    voice = VOICES[keyed_hash("voice", seed, emoji.key) % len(VOICES)]
    flac = io.BytesIO()
    soundfile.write(flac, speak(emoji.name, voice), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    facts = {
        "names": {"en": emoji.name, "zh": emoji.name_zh},
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "voice": voice.name,
        "speech_rate": voice.rate,
        "emoji": emoji.text,
        "picture": emoji.picture,
    }
    return {
        "__key__": emoji.key,
        "png": render_picture(emoji.svg, image_size),
        "txt": emoji.name.encode(),
        "flac": flac.getvalue(),
        "json": json.dumps(facts, ensure_ascii=False).encode(),
    }


def render_picture(svg: str, image_size: int) -> bytes:
    """The picture as an RGB png of ``image_size`` squared, on white: on black its black outlines would vanish."""
    resvg = demo_package("resvg_py")
    drawn = resvg.svg_to_bytes(
        svg_path=svg, width=image_size, height=image_size, background="white", skip_system_fonts=True
    )
    png = io.BytesIO()
    Image.open(io.BytesIO(bytes(drawn))).convert("RGB").save(png, "png")
    return png.getvalue()
