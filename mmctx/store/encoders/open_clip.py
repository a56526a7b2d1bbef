"""Models of open_clip as encoders of texts and pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmctx.errors import ConfigError, MmctxError
from mmctx.store.encoders.base import by_kind
from mmctx.store.encoders.transformers import pillow
from mmctx.store.entries import Kind
from mmctx.store.provenance import Provenance


class OpenClipEncoder:
    """`NAME@WEIGHTS`: an architecture of open_clip and a file or tag of weights, or `local-dir:FOLDER`.

    Raises:
        ConfigError: open_clip does not know it, or no weights are named.
        MmctxError: open_clip is not installed.
    """

    def __init__(self, model: str, name: str) -> None:
        try:
            import open_clip
        except ImportError:
            raise MmctxError(f"{name}: needs the package open_clip_torch: pip install 'mmctx[clip]'") from None
        architecture, _, weights = model.partition("@")
        if not weights and not architecture.startswith("local-dir:"):
            raise ConfigError(
                f"{name}: name its weights, too, such as open_clip:ViT-B-32@FILE: random ones tell nothing apart"
            )
        try:
            made = open_clip.create_model_and_transforms(architecture, pretrained=weights or None)
            self.model: Any = made[0].eval()
            self.transform: Any = made[2]
            self.tokenizer: Any = open_clip.get_tokenizer(architecture)
        except Exception as error:  # open_clip raises several types
            raise ConfigError(f"{name}: open_clip cannot open {model!r}: {error}") from None
        digest = hashlib.blake2b(architecture.rpartition("/")[2].encode(), digest_size=8)
        for key, tensor in sorted(self.model.state_dict().items()):
            digest.update(key.encode() + tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self._functions: Any = {"text": self._texts, "image": self._images}
        dim = self._texts(["a"]).shape[-1]
        self.provenance = Provenance(name, digest.hexdigest(), dim, ("text", "image"))

    def prepare(self, kind: Kind, value: str | bytes) -> tuple[Kind, Any]:
        """See `Encoder`."""
        return kind, value if isinstance(value, str) else self.transform(pillow(value))

    def embed(self, prepared: Sequence[tuple[Kind, Any]]) -> np.ndarray:
        """See `Encoder`."""
        return by_kind(prepared, self._functions, self.provenance.dim)

    def _texts(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts)).detach()

    def _images(self, pictures: list[Tensor]) -> Tensor:
        return self.model.encode_image(torch.stack(pictures)).detach()
