"""What a checkpoint writes behind text, pictures and sounds: the work of `mmctx generate`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, TextStreamer
from transformers.utils import logging

from mmctx.errors import CheckpointError, ConfigError
from mmctx.hf.model import MmctxForConditionalGeneration
from mmctx.hf.processor import MmctxProcessor
from mmctx.hf_files import MODEL_TYPE


class Part(NamedTuple):
    """A piece of a prompt.

    Attributes:
        kind: `text`, `image` or `audio`.
        value: the text, or the file: its path or its bytes.
    """

    kind: str
    value: str | bytes


class Answer(NamedTuple):
    """What was written.

    Attributes:
        text: without special tokens.
        tokens: ids, the end included if it came.
        prompt_tokens: tokens that were read, embeddings of media included.
        seconds: of reading and writing, without loading.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    seconds: float


def model_folder(path: Path) -> Path:
    """A folder that `from_pretrained` opens: a checkpoint, the newest whole one of a run, or what `save_pretrained` wrote.

    Raises:
        CheckpointError: there is none.
    """
    from mmctx.train.checkpoints.layout import resolve_checkpoint

    config = path / "config.json"
    if config.is_file() and not (path / "COMPLETE").exists():
        try:
            kind = json.loads(config.read_text()).get("model_type")
        except ValueError as error:
            raise CheckpointError(f"{config}: cannot be read ({error})") from None
        if kind != MODEL_TYPE:
            raise CheckpointError(f"{config}: model_type is {kind!r}, not {MODEL_TYPE!r}: no model of mmctx")
        return path
    return resolve_checkpoint(path)


def write_answer(
    checkpoint: Path,
    parts: Sequence[Part],
    options: Mapping[str, Any],
    *,
    seed: int | None = None,
    stream: bool = False,
) -> Answer:
    """Continues a prompt.

    Args:
        checkpoint: see `model_folder`.
        parts: of the prompt, in reading order.
        options: for Transformers' `generate`, such as `max_new_tokens`.
        seed: of what is drawn; None draws anew each time.
        stream: print the text on stdout while it is written.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: the prompt is empty.
        DataError: a file cannot be decoded, or the model has no encoder for it.
    """
    if not any(part.value for part in parts):
        raise ConfigError("the prompt is empty: give a text, --image FILE or --audio FILE behind the checkpoint")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    folder = model_folder(checkpoint)
    processor: MmctxProcessor = AutoProcessor.from_pretrained(folder)
    inputs = processor.read_parts(parts)
    model: Any = MmctxForConditionalGeneration.from_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, inputs = model.to(device), inputs.to(device)
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    if seed is not None:
        torch.manual_seed(seed)
    start, prompt = time.perf_counter(), inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, streamer=streamer, **options)[0, prompt:].tolist()
    text = processor.tokenizer.decode(tokens, skip_special_tokens=True)
    return Answer(str(text), tokens, prompt, time.perf_counter() - start)
