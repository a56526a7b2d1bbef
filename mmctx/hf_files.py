"""What a model's folder holds beside weights and tokenizer so that Transformers opens it. Needs no Transformers itself.

config.json             model_type, shape, objectives, ids of special tokens; `auto_map` names the classes of the next file
modeling_mmctx.py       three lines that import `mmctx.hf`: with `trust_remote_code=True` nobody need import it first
generation_config.json  where texts end
processor_config.json   encoders' geometry, for pictures and sounds that are to be read
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mmctx.model import ModelConfig
from mmctx.objectives import AnyObjective
from mmctx.pack import MODALITIES
from mmctx.tokenizer import TextTokenizer

MODEL_TYPE = "mmctx"
MODEL_CLASS, CONFIG_CLASS, PROCESSOR_CLASS = "MmctxForConditionalGeneration", "MmctxConfig", "MmctxProcessor"
MODELING = "modeling_mmctx.py"
MODELING_SOURCE = f'''"""Lets Transformers find the classes of this model: they are in the package mmctx (pip install mmctx)."""

from mmctx.hf import {CONFIG_CLASS}, {MODEL_CLASS}, {PROCESSOR_CLASS}  # noqa: F401
'''
PROCESSOR_AUTO_MAP = {"AutoProcessor": f"modeling_mmctx.{PROCESSOR_CLASS}"}
AUTO_MAP = {
    "AutoConfig": f"modeling_mmctx.{CONFIG_CLASS}",
    "AutoModel": f"modeling_mmctx.{MODEL_CLASS}",
    "AutoModelForCausalLM": f"modeling_mmctx.{MODEL_CLASS}",
    "AutoModelForImageTextToText": f"modeling_mmctx.{MODEL_CLASS}",
    **PROCESSOR_AUTO_MAP,
}


def describe_model(
    model: ModelConfig, objectives: Mapping[str, AnyObjective], tokenizer: TextTokenizer, vocab_size: int
) -> dict[str, Any]:
    """The `config.json` of a model, as `MmctxConfig` reads it."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [MODEL_CLASS],
        "auto_map": AUTO_MAP,
        "dtype": "float32",
        "vocab_size": vocab_size,
        "model": model.model_dump(mode="json"),
        "objectives": {name: objective.model_dump(mode="json") for name, objective in objectives.items()},
        "special_tokens": special_tokens(tokenizer),
    }


def special_tokens(tokenizer: TextTokenizer) -> dict[str, int]:
    """Ids by what they stand for: `image`, `audio`, `mask`, `embed`, `eos`, and `bos` where documents begin with it."""
    ours = {"mask": tokenizer.mask_id, "embed": tokenizer.embed_id, "eos": tokenizer.eos_id}
    begin = {"bos": int(tokenizer.begin[0])} if len(tokenizer.begin) else {}
    return dict(tokenizer.placeholder_ids) | ours | begin


def generation_defaults(special: Mapping[str, int]) -> dict[str, Any]:
    """What `generate` does unless it is told: texts end at `eos`, and no placeholder is written, behind which there would be no media."""
    placeholders = [special[kind] for kind in MODALITIES if kind in special]
    eos = special.get("eos")
    begin = {"bos_token_id": special["bos"]} if "bos" in special else {}
    return {**begin, "eos_token_id": eos, "pad_token_id": eos, "suppress_tokens": placeholders or None}


def side_files(model: ModelConfig, tokenizer: TextTokenizer) -> dict[str, bytes]:
    """The other three files, by name."""
    generation = generation_defaults(special_tokens(tokenizer))
    processor = {
        "processor_class": PROCESSOR_CLASS,
        "auto_map": PROCESSOR_AUTO_MAP,
        "image": model.image and model.image.model_dump(mode="json"),
        "audio": model.audio and model.audio.model_dump(mode="json"),
        "bos": bool(len(tokenizer.begin)),
    }
    return {
        MODELING: MODELING_SOURCE.encode(),
        "generation_config.json": json.dumps(generation, indent=2).encode(),
        "processor_config.json": json.dumps(processor, indent=2).encode(),
    }
