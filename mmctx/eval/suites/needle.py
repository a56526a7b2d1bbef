"""Suite `needle`: what is hidden in a document of L tokens, of text, pictures or sound, and found again, over lengths and depths.

| kind | hidden | asked |
|---|---|---|
| `single` | the magic number of a key | that number |
| `multi_key` | those of several keys | that of one |
| `multi_value` | several numbers of one key | all of them |
| `multi_query` | those of several keys | all of them |
| `variable_tracking` | two chains of assignments | all variables of a value |
| `common_words`, `frequent_words` | nothing: the document is a list of words | the commonest |
| `picture`, `sound` | one picture or clip | what it shows, which of the candidates' it is |
| `picture_value`, `sound_value` | the pictures or clips of several keys | what that of one shows |
| `picture_key`, `sound_key` | the magic numbers of several pictures or clips | that of one, which is shown again |
| `picture_count`, `sound_count` | boxes of pictures or clips | how many there are in each |
| `picture_sound` | pictures of keys, clips that belong to the pictures | what is heard in the clip of a key's picture |

Text kinds are RULER's (Hsieh et al. 2024), in its words; pictures and sounds are held-out samples of the run, with their texts as names. A
kind whose material or modality is lacking is left out, and `left_out` says why.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from mmctx.eval.context import EvalContext
from mmctx.eval.haystack.config import NeedleConfig
from mmctx.eval.haystack.grid import Kind, run_grid
from mmctx.eval.haystack.material import named_media
from mmctx.eval.haystack.media_needles import MEDIA_KINDS, NEEDS, Media
from mmctx.eval.haystack.sources import open_haystack
from mmctx.eval.haystack.text_needles import TEXT_KINDS

_ENCODERS = {"image": "pictures", "audio": "sound"}


def evaluate_needle(context: EvalContext) -> dict[str, Any]:
    """See `mmctx.eval.haystack.grid.run_grid`; empty where no held-out source serves captioning, so that nothing was learnt to write."""
    config = context.config.needle
    for objective in context.names("captioning")[:1]:
        data = context.data.only(objective)
        needs_media = any(kind in MEDIA_KINDS for kind in config.kinds)
        media = named_media(data, config.sources, config.media) if needs_media else {}
        blind = _without_encoder(context)
        lacking = {kind: blind[need] for kind in config.kinds for need in NEEDS.get(kind, ()) if need in blind}
        kinds = {kind: make_kind(kind, config, media) for kind in config.kinds if kind not in lacking}
        results = run_grid(context, "needle", config, kinds, open_haystack(config.haystack, data))
        reasons = [{"kind": kind, "length": None, "reason": reason} for kind, reason in lacking.items()]
        return {**results, "left_out": [*results["left_out"], *reasons]}
    return {}


def make_kind(name: str, config: NeedleConfig, media: Media) -> Kind:
    """One of `NEEDLE_KINDS` under a configuration."""
    if name in TEXT_KINDS:
        make, has_depth = TEXT_KINDS[name]
        return Kind(functools.partial(make, config), has_depth=has_depth)
    make, modality, has_depth, grader = MEDIA_KINDS[name]
    return Kind(functools.partial(make, modality, config, media), grader, has_depth)


def _without_encoder(context: EvalContext) -> Mapping[str, str]:
    """Modalities that the model cannot perceive, and why."""
    preprocessors = context.data.dataset.tables[0].preprocessors
    return {
        kind: f"the model has no encoder of {name}: model.{kind} is null"
        for kind, name in _ENCODERS.items()
        if getattr(preprocessors, kind) is None
    }
