"""Rotary positions in Transformers' words, `rope_parameters`, and in ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmctx.pretrained.folder import refuse
from mmctx.rope import RopeConfig

_KINDS = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}
_OPTIONS = {
    "yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"),
    "llama3": ("low_freq_factor", "high_freq_factor"),
}


def read_rope(config: Any, folder: Path) -> dict[str, Any]:
    """Fields of `RopeConfig` of a Transformers configuration.

    Raises:
        ConfigError: a scaling that we do not have, or rotation of a part of the channels.
    """
    theirs = config.rope_parameters
    kind = theirs.get("rope_type", "default")
    if kind not in _KINDS:
        remedy = f"known are {', '.join(_KINDS)}; to start from the weights with other positions, set model.transformer.rope.scaling"
        raise refuse(folder, "rope_parameters.rope_type", kind, remedy)
    if theirs.get("partial_rotary_factor", 1.0) != 1.0:
        share = theirs["partial_rotary_factor"]
        raise refuse(folder, "rope_parameters.partial_rotary_factor", share, "only rotation of all channels is known")
    ours: dict[str, Any] = {"base": float(theirs["rope_theta"]), "scaling": _KINDS[kind]}
    if kind != "default":
        ratio = config.max_position_embeddings / theirs.get("original_max_position_embeddings", 1)
        ours["factor"] = float(theirs.get("factor") or ratio)
    if kind in _OPTIONS:
        ours["original_context"] = theirs["original_max_position_embeddings"]
        ours |= {name: theirs[name] for name in _OPTIONS[kind] if theirs.get(name) is not None}
    if not ours.get("mscale") or not ours.get("mscale_all_dim"):  # Transformers reads them together, or neither
        ours.pop("mscale", None)
        ours.pop("mscale_all_dim", None)
    return ours


def write_rope(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of the same positions. NTK of a fixed factor is a larger base."""
    if rope.scaling == "ntk":
        return {"rope_type": "default", "rope_theta": rope.base * rope.factor ** (head_dim / (head_dim - 2))}
    kind = {ours: theirs for theirs, ours in _KINDS.items()}[rope.scaling]
    theirs: dict[str, Any] = {"rope_type": kind, "rope_theta": rope.base}
    if kind != "default":
        theirs["factor"] = rope.factor
    if kind in _OPTIONS:
        theirs["original_max_position_embeddings"] = rope.original_context
        theirs |= {name: value for name in _OPTIONS[kind] if (value := getattr(rope, name)) is not None}
    return theirs


def say_rope_as_before(path: Path) -> None:
    """Repeats `rope_parameters` of a `config.json` as `rope_theta` and `rope_scaling`: readers before Transformers 5 know these alone, and
    would take the default positions without a word."""
    tree = json.loads(path.read_text())
    rope = tree.get("rope_parameters")
    if rope is None:
        return
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    tree |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
    path.write_text(json.dumps(tree, indent=2) + "\n")
