"""Models of Transformers as encoders: CLIP-like ones with text and pictures, others with what they were made for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import ConfigError
from mmctx.store.encoders.base import by_kind, fingerprint_files
from mmctx.store.entries import Kind
from mmctx.store.provenance import Provenance


class TransformersEncoder:
    """A folder that `save_pretrained` wrote.

    CLIP-like models (with `get_text_features` and `get_image_features`) embed texts and pictures. Of a text model the states of all tokens
    are averaged, as Sentence-BERT does (Reimers & Gurevych 2019); of a picture model the pooled output, or the first token's state.

    Raises:
        ConfigError: the folder holds no model, or neither tokenizer nor image processor.
    """

    def __init__(self, folder: str, name: str) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name}: {folder} holds no config.json; name a folder that save_pretrained wrote")
        self.model = AutoModel.from_pretrained(folder).eval()
        self.tokenizer = _or_none(lambda: AutoTokenizer.from_pretrained(folder))
        self.processor = _or_none(lambda: AutoImageProcessor.from_pretrained(folder))
        both = hasattr(self.model, "get_text_features") and hasattr(self.model, "get_image_features")
        takes_text = both or self.model.main_input_name == "input_ids"
        kinds: list[Kind] = ["text"] if self.tokenizer is not None and takes_text else []
        if self.processor is not None and (both or not takes_text):
            kinds.append("image")
        if not kinds:
            raise ConfigError(
                f"{name}: {type(self.model).__name__} with neither a tokenizer nor an image processor beside it"
            )
        self._both = both
        functions = {"text": self._texts, "image": self._images}
        self._functions: Any = {kind: functions[kind] for kind in kinds}
        files = [file for pattern in ("*.safetensors", "*.bin", "tokenizer.json", "vocab.txt", "preprocessor_config.json")
                 for file in path.glob(pattern)]  # fmt: skip
        probe: Tensor = self._functions[kinds[0]]([self.prepare(kinds[0], "a" if kinds[0] == "text" else _GREY)[1]])
        self.provenance = Provenance(name, fingerprint_files(files), probe.shape[-1], tuple(kinds))

    def prepare(self, kind: Kind, value: str | bytes) -> tuple[Kind, Any]:
        """See `Encoder`."""
        return kind, value if isinstance(value, str) else pillow(value)

    def embed(self, prepared: Sequence[tuple[Kind, Any]]) -> np.ndarray:
        """See `Encoder`."""
        return by_kind(prepared, self._functions, self.provenance.dim)

    @torch.inference_mode()
    def _texts(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        if self._both:
            return _tensor(self.model.get_text_features(**tokens))
        states = self.model(**tokens).last_hidden_state  # (b, L, C)
        mask = tokens["attention_mask"][..., None]
        return (states * mask).sum(1) / mask.sum(1)

    @property
    def _longest(self) -> int:
        config = getattr(self.model.config, "text_config", self.model.config)
        return min(getattr(config, "max_position_embeddings", 512), self.tokenizer.model_max_length)

    @torch.inference_mode()
    def _images(self, pictures: list[Any]) -> Tensor:
        pixels = self.processor(images=pictures, return_tensors="pt")
        if self._both:
            return _tensor(self.model.get_image_features(**pixels))
        found = self.model(**pixels)
        pooled = getattr(found, "pooler_output", None)
        return found.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def pillow(data: bytes) -> Any:
    """A picture for a library's own processor, decoded as everywhere in mmctx: transparency over white.

    Raises:
        SampleError: ``undecodable_image``.
    """
    from PIL import Image

    from mmctx.datasets.decode import decode_image

    return Image.fromarray(decode_image(data).permute(1, 2, 0).contiguous().numpy())


def _grey() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(out, "PNG")
    return out.getvalue()


_GREY = _grey()


def _tensor(found: Any) -> Tensor:
    """Features themselves: Transformers 5 gives them as an output with `pooler_output`."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _or_none(load: Any) -> Any:
    """A tokenizer or processor; None where the folder has none of its kind."""
    try:
        return load()
    except Exception:  # Transformers raises many types for what is not there
        return None
