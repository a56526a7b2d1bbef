"""`MmctxProcessor`: texts, pictures and sounds become what the model reads, laid out as in training.

Shapes: B rows, L columns, I items, F frames of the longest clip, M mel bins, S side of a picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from mmctx.chat import DEFAULT_TEMPLATE
from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.image import ImagePreprocessor
from mmctx.errors import DataError
from mmctx.hf.config import MmctxConfig
from mmctx.hf.media import pixels_of, samples_of
from mmctx.hf.prompts import (
    MARKS,
    mark_rows,
    media_inputs,
    media_of_messages,
    pad_rows,
    split_at_marks,
)
from mmctx.hf_files import MODELING, MODELING_SOURCE, PROCESSOR_AUTO_MAP
from mmctx.model import ModelConfig
from mmctx.pack import MediaItem
from mmctx.tokenizer import PLACEHOLDERS


class MmctxProcessor(ProcessorMixin):
    """Tokenizer, picture and sound preprocessors of a model.

    Args:
        tokenizer: with the special tokens that mmctx adds.
        chat_template: Jinja; by default the tokenizer's own, or `mmctx.chat.DEFAULT_TEMPLATE`.
        image: `model.image` of the configuration; None for a model that sees no pictures.
        audio: `model.audio`.
        bos: whether every row begins with the tokenizer's `bos_token`, as documents do in training with `data.bos`.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image: Mapping[str, Any] | None = None,
        audio: Mapping[str, Any] | None = None,
        bos: bool = False,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template or tokenizer.chat_template or DEFAULT_TEMPLATE)
        self.image, self.audio, self.bos, self.auto_map = image, audio, bos, PROCESSOR_AUTO_MAP
        self._preprocessors: dict[str, Any] | None = None

    @property
    def preprocessors(self) -> dict[str, Any]:
        """By modality."""
        if self._preprocessors is None:
            shape = ModelConfig.model_validate({"image": self.image, "audio": self.audio})
            self._preprocessors = {}
            if shape.image is not None:
                self._preprocessors["image"] = ImagePreprocessor(shape.image)
            if shape.audio is not None:
                self._preprocessors["audio"] = AudioPreprocessor(shape.audio)
        return self._preprocessors

    def __call__(  # type: ignore[override]
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        *,
        sampling_rate: int | None = None,
        padding: bool = True,
        padding_side: str = "left",
        return_tensors: str = "pt",
        special_tokens: bool = False,
    ) -> BatchFeature:
        """Inputs of the model.

        A text says by `<|image|>` and `<|audio|>` where its media stand; where no text says it, each row's media stand before its text,
        pictures first.

        Args:
            images: a picture, or a list of them: in reading order over all rows, or a list for each row. See `pixels_of`.
            text: a text, or one for each row; None for media alone.
            audio: sounds, likewise. See `samples_of`.
            sampling_rate: of sounds that are given as samples, in Hz.
            padding: True alone: rows of different lengths are padded.
            padding_side: "left", as generation wants it, or "right".
            return_tensors: "pt" alone.
            special_tokens: whether special tokens that are written out in a text count as such, as chat templates need it. In training
                they are plain characters.

        Returns:
            input_ids (B, L), attention_mask (B, L), and see `media_inputs`.

        Raises:
            DataError: media and their marks are not equally many, or the model has no encoder for them, or something cannot be decoded.
        """
        if return_tensors != "pt" or not padding or padding_side not in ("left", "right"):
            raise DataError(
                f"return_tensors={return_tensors!r}, padding={padding}, padding_side={padding_side!r}: inputs are PyTorch tensors (pt), "
                "padded at the left or right"
            )
        texts = [text] if isinstance(text, str) else (None if text is None else list(text))
        media = {kind: value for kind, value in (("image", images), ("audio", audio)) if value is not None}
        rows, found = mark_rows(texts, media)
        items = {kind: [self._item(kind, value, sampling_rate) for value in values] for kind, values in found.items()}
        waiting = {kind: iter(of_kind) for kind, of_kind in items.items()}
        ids = [self._lay_out(row, waiting, special_tokens) for row in rows]
        return BatchFeature(pad_rows(ids, self._pad_id(), padding_side) | media_inputs(items))

    def read_parts(self, parts: Sequence[tuple[str, Any]]) -> BatchFeature:
        """Inputs of one prompt that is given part by part, laid out as an interleaved document of training.

        Each text is tokenized by itself, and marks of media and special tokens in it are plain characters.

        Args:
            parts: (`text`, text), (`image`, see `pixels_of`) or (`audio`, see `samples_of`), in reading order.

        Raises:
            DataError: the model has no encoder for a part, or it cannot be decoded.
        """
        ids, items = [np.zeros(0, np.int64)], {kind: [] for kind in MARKS.values()}
        for kind, value in parts:
            if kind == "text":
                ids.append(self._tokenize(value))
            else:
                items[kind].append(item := self._item(kind, value, None))
                ids.append(self._room_for(item))
        return BatchFeature(pad_rows([np.concatenate(ids)], self._pad_id(), "left") | media_inputs(items))

    def _item(self, kind: str, value: Any, rate: int | None) -> MediaItem:
        if kind not in self.preprocessors:
            raise DataError(f"this model has no encoder for {kind} inputs: model.{kind} of its configuration is null")
        if kind == "image":
            return self.preprocessors[kind](pixels_of(value))
        with torch.autocast("cpu", enabled=False):  # as decoding for training
            return self.preprocessors[kind](*samples_of(value, rate))

    def _lay_out(self, row: str, waiting: Mapping[str, Iterator[MediaItem]], special_tokens: bool) -> np.ndarray:
        """(L,) int64 ids, placeholders for the embeddings of each item in turn; a `bos_token` of the template is not written twice."""
        parts = [np.asarray([self.tokenizer.bos_token_id] if self.bos else [], np.int64)]
        if self.bos and special_tokens:
            row = row.removeprefix(self.tokenizer.bos_token)
        for part in split_at_marks(row):
            kind = MARKS.get(part)
            parts.append(self._room_for(next(waiting[kind])) if kind else self._tokenize(part, special_tokens))
        return np.concatenate(parts)

    def _room_for(self, item: MediaItem) -> np.ndarray:
        """A placeholder for each of its embeddings."""
        return np.full(item.num_tokens, self.tokenizer.convert_tokens_to_ids(PLACEHOLDERS[item.kind]), np.int64)

    def _tokenize(self, text: str, special_tokens: bool = False) -> np.ndarray:
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=not special_tokens)
        return np.asarray(found["input_ids"], np.int64)

    def _pad_id(self) -> int:
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation, or of several: its text, or with `tokenize` what the model reads.

        Args:
            conversation: messages `{"role", "content"}`, whose content is a text or parts `{"type": "text", "text"}`,
                `{"type": "image", "image" | "path" | "url"}`, `{"type": "audio", "audio" | "path" | "url"}` in reading order.
            chat_template: Jinja; the processor's by default.
            add_generation_prompt, continue_final_message: as Transformers' tokenizers take them.
            tokenize: make inputs of it.
            return_dict: with `tokenize`, all inputs; else ids alone.
            return_tensors: "pt" alone.
            processor_kwargs: for `__call__`.
            kwargs: for the template.
        """
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations = list(conversation) if batched else [conversation]
        texts = self.tokenizer.apply_chat_template(
            conversations,
            chat_template=chat_template or self.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **kwargs,
        )
        if not tokenize:
            return texts if batched else texts[0]
        media = media_of_messages(conversations)
        options = {"return_tensors": return_tensors, "special_tokens": True} | dict(processor_kwargs or {})
        inputs = self(images=media["image"] or None, text=texts, audio=media["audio"] or None, **options)
        return inputs if return_dict else inputs["input_ids"]

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """Writes the tokenizer, `processor_config.json` and the three lines that find this class."""
        found = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        (Path(save_directory) / MODELING).write_text(MODELING_SOURCE)
        return found

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Of a folder; one without `processor_config.json` (a checkpoint of an earlier version) tells the encoders in its `config.json`."""
        tree, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "image" not in tree and "audio" not in tree:
            model = MmctxConfig.from_pretrained(pretrained_model_name_or_path).model
            tree = tree | {"image": model["image"], "audio": model["audio"]}
        return tree, kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """See `MmctxConfig.register_for_auto_class`."""
