"""Classification of documents: `-sum w_y log softmax(W h + b)_y`, h the document's embedding, y the class that its json member names."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from mmctx.errors import SampleError
from mmctx.objectives.labelled import Labelled, LabelledConfig, LabelledLoss
from mmctx.tokenizer import TextTokenizer


class ClassificationConfig(LabelledConfig):
    """Which of a few classes a document belongs to."""

    kind: Literal["classification"] = "classification"
    classes: tuple[bool | int | str, ...]
    """Labels as they stand in the json member: texts, whole numbers, true and false. Any other makes the sample one that cannot be used."""
    class_weights: tuple[float, ...] | None = None
    """Factor of the loss of each class's documents, which are counted once all the same; null for 1."""

    @property
    def names(self) -> tuple[str, ...]:
        """The classes as text."""
        return tuple(map(_name, self.classes))

    @model_validator(mode="after")
    def _check(self) -> ClassificationConfig:
        if len(self.names) < 2 or len(set(self.names)) < len(self.names):
            raise ValueError(f"classes must be two or more different ones, found {list(self.names)}")
        if self.class_weights is not None and len(self.class_weights) != len(self.classes):
            raise ValueError(f"class_weights has {len(self.class_weights)} entries for {len(self.classes)} classes")
        if any(weight < 0 for weight in self.class_weights or ()):
            raise ValueError(f"class_weights must not be negative, found {list(self.class_weights or ())}")
        return self


def _name(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


class Classification(Labelled):
    """Data half."""

    def __init__(self, name: str, config: ClassificationConfig, tokenizer: TextTokenizer) -> None:
        super().__init__(name, config, tokenizer)
        self.answers = config.names
        self._numbers = {label: number for number, label in enumerate(config.names)}

    def number(self, value: Any) -> int:
        """Number of the class."""
        found = self._numbers.get(_name(value))
        if found is None:
            raise SampleError("bad_json", f"expected one of {', '.join(self._numbers)}, found {_name(value)[:80]}")
        return found


class ClassificationLoss(LabelledLoss):
    """Model half: softmax over the classes."""

    class_weights: Tensor | None

    def __init__(self, name: str, config: ClassificationConfig, width: int) -> None:
        super().__init__(name, config, width, len(config.classes))
        weights = None if config.class_weights is None else torch.tensor(config.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def penalty(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        weights = None if self.class_weights is None else self.class_weights.to(scores.dtype)
        # `mmctx audit` asks for the loss of the next label, which of the last class is the first
        return F.cross_entropy(scores, targets % scores.shape[1], weight=weights, reduction="sum")
