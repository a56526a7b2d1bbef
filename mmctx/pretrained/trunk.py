"""Weights of a Transformers folder into a model, and a model's trunk into such a folder.

Shapes: V rows of an embedding, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmctx.errors import ConfigError
from mmctx.learned_positions import resize_positions
from mmctx.model import MmctxModel
from mmctx.pretrained.family import Family
from mmctx.pretrained.folder import KEY, Weights, read_config
from mmctx.pretrained.rope_parameters import say_rope_as_before
from mmctx.pretrained.shape import FAMILIES, check_agrees, read_shape
from mmctx.transformer import TransformerConfig


def trunk_config(folder: str | Path) -> TransformerConfig:
    """The shape of the trunk that a folder's weights fit.

    Raises:
        ConfigError: see `read_shape`.
    """
    return TransformerConfig.model_validate(read_shape(Path(folder)) | {"pretrained": str(folder)})


@torch.no_grad()
def load_trunk(model: MmctxModel, folder: str | Path) -> None:
    """Copies embeddings, trunk and output head of a folder into a model, whatever precision they are stored in.

    Rows of tokens that the folder's tokenizer does not know are drawn around the mean of those it knows, from PyTorch's generator.

    Raises:
        ConfigError: the folder and the model do not fit.
    """
    folder, config = Path(folder), model.config.transformer
    check_agrees(config, read_shape(folder, rope_is_given=True), folder)
    family = FAMILIES[read_config(folder).model_type]
    weights = Weights(folder, family.prefix)
    for name, tensor in _tensors(model, family, weights):  # one at a time: a second copy of the model may not fit
        _copy(model.get_parameter(name), tensor, name, folder)
    buffers = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")  # of older Transformers: masks and angles
    left = [name for name in weights.unread if name.startswith(family.layers) and not name.endswith(buffers)]
    if left:
        raise ConfigError(
            f"{KEY}: {folder} holds {min(left)!r}, which no {config.depth}-layer trunk of this family has; it is another model"
        )


def _tensors(model: MmctxModel, family: Family, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """What the folder has for the model, by our names."""
    config = model.config.transformer
    for part in _parts(model, family):
        yield part.ours, part.join([weights.read(name) for name in part.theirs])
    if family.positions is not None and config.learned_positions is not None:
        table = weights.read(family.positions).float()
        if family.token_types is not None:
            table = table + weights.read(family.token_types)[0].float()
        yield "trunk.positions.weight", resize_positions(table, config.learned_positions, config.resize_positions)
    known = _known_ids(weights.folder)
    for ours, theirs in _vocabulary(model, family).items():
        name = next((name for name in theirs if name in weights), theirs[0])
        yield ours, _grown(weights.read(name).float(), len(model.get_parameter(ours)), known)
    if family.heads is not None:
        yield from family.heads(model, weights).items()


def _parts(model: MmctxModel, family: Family) -> list[Any]:
    """The family's parts that the model has: without an objective that predicts tokens it has no head."""
    parts = family.parts(model.config.transformer)
    return [part for part in parts if model.head_transform is not None or not part.ours.startswith("head_transform.")]


def _vocabulary(model: MmctxModel, family: Family) -> dict[str, tuple[str, ...]]:
    """Our tensors with a row for each token, and their names for it."""
    names: dict[str, tuple[str, ...]] = {"embedding.weight": (family.embedding,)}
    if model.head is not None:
        names["head.weight"] = (family.head,)
    if model.head_transform is not None:
        names["head_transform.bias"] = family.head_biases
    return names


def _known_ids(folder: Path) -> int | None:
    """One more than the largest id of the folder's tokenizer: embeddings may have more rows, to a round number. None without one."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    return max(Tokenizer.from_file(str(path)).get_vocab().values()) + 1 if path.is_file() else None


def _grown(old: Tensor, num_rows: int, known: int | None) -> Tensor:
    """(num_rows, ...): rows of known tokens, then rows drawn with their mean and standard deviation, channel by channel."""
    old = old[: min(num_rows, len(old) if known is None else known)]
    fresh = torch.randn(num_rows - len(old), *old.shape[1:])
    return torch.cat([old, old.mean(dim=0) + old.std(dim=0) * fresh])


def _copy(parameter: Tensor, tensor: Tensor, name: str, folder: Path) -> None:
    if parameter.shape != tensor.shape:
        raise ConfigError(
            f"{KEY}: {folder} has {tuple(tensor.shape)} for {name}, the model {tuple(parameter.shape)}; its config.json "
            "does not belong to its weights"
        )
    parameter.copy_(tensor)


def check_vocabulary(folder: str | Path, tokenizer: str | Path, bos: bool) -> None:
    """Whether a tokenizer gives every token the id that the folder's weights know it by. Warns of texts that began otherwise for them.

    Args:
        folder: of the weights.
        tokenizer: of the run.
        bos: see `DataConfig.bos`.

    Raises:
        ConfigError: it does not.
    """
    from tokenizers import Tokenizer

    ours, theirs = Path(tokenizer) / "tokenizer.json", Path(folder) / "tokenizer.json"
    if not theirs.is_file() or not ours.is_file():
        return
    begun = Tokenizer.from_file(str(theirs)).encode("").tokens
    if not bos and len(begun) == 1:  # BERT's `[CLS]` and `[SEP]` are two
        warnings.warn(
            f"{folder}: its tokenizer begins texts with {begun[0]}, this run does not; set data.bos=true", stacklevel=2
        )
    if ours.samefile(theirs):
        return
    known, vocabulary = (Tokenizer.from_file(str(path)).get_vocab() for path in (theirs, ours))
    for token, number in known.items():
        if vocabulary.get(token) != number:
            raise ConfigError(
                f"data.tokenizer: {str(tokenizer)!r} gives {token!r} the id {vocabulary.get(token)}, but the weights of "
                f"{KEY}={str(folder)!r} know it as {number}; set data.tokenizer to that folder"
            )


@torch.no_grad()
def export_trunk(
    model: MmctxModel, folder: str | Path, to: str, *, context_length: int, eos_token_id: int | None = None
) -> None:
    """Writes embeddings, trunk and output head as a folder that Transformers loads: `config.json` and `model.safetensors`.

    Encoders and the heads of other objectives are left out.

    Args:
        model: on any device.
        folder: made if it is missing.
        to: one of `FAMILIES`.
        context_length: for `max_position_embeddings`, where positions are not learned.
        eos_token_id: for generation.

    Raises:
        ConfigError: the family cannot say something that the trunk has, or is unknown.
    """
    folder, config = Path(folder), model.config.transformer
    if to not in FAMILIES:
        raise ConfigError(f"--to {to}: known families are {', '.join(FAMILIES)}")
    family = FAMILIES[to]
    if reasons := family.objections(config):
        raise ConfigError(
            f"a model of {to} cannot say this trunk: " + "; ".join(f"model.transformer.{r}" for r in reasons)
        )
    if config.memory is not None:
        raise ConfigError(
            f"a model of {to} cannot say this trunk: model.transformer.memory (layers {list(config.memory.layers)}) is nothing that "
            "Transformers' models have; export a run without one"
        )
    if not config.tie_embeddings and model.head is None:
        raise ConfigError(
            "the model has no output head: none of its objectives predicts tokens, and tie_embeddings is false"
        )
    about = {"vocab_size": model.vocab_size, "context_length": context_length, "eos_token_id": eos_token_id}
    theirs = family.describe(config, about)
    theirs.architectures, theirs.dtype = [_class_name(theirs, family.auto)], "float32"
    tensors = _their_tensors(model, family, TransformerConfig.model_validate(family.shape(theirs, folder)))
    folder.mkdir(parents=True, exist_ok=True)
    theirs.save_pretrained(folder)
    say_rope_as_before(folder / "config.json")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _class_name(config: Any, auto: str) -> str:
    import transformers

    return getattr(transformers, auto)._model_mapping[type(config)].__name__


def _their_tensors(model: MmctxModel, family: Family, target: TransformerConfig) -> dict[str, Tensor]:
    """Everything under the names of the family's class with a head; biases that only the family has are zeros."""
    ours: dict[str, Tensor] = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    theirs: dict[str, Tensor] = {}
    for part in family.parts(target):
        if part.ours not in ours:
            weight = ours[part.ours.removesuffix("bias") + "weight"]
            ours[part.ours] = weight.new_zeros(len(weight))
        theirs |= part.split(ours[part.ours])
    if family.positions is not None:
        theirs[family.positions] = ours["trunk.positions.weight"]
    if family.token_types is not None:
        theirs[family.token_types] = ours["embedding.weight"].new_zeros(2, target.width)
    for name, others in _vocabulary(model, family).items():
        rows: Tensor = ours[name][: model.vocab_size]
        theirs |= dict.fromkeys(others, rows)
    heads = ("lm_head.", "cls.")  # beside the trunk, not in it
    return {
        name if name.startswith(heads) else family.prefix + name: tensor.clone().contiguous()
        for name, tensor in theirs.items()
    }
