"""EfficientNets of timm as vision towers: their last feature map, position by position, as patch tokens.

Their batch norms are frozen (Tan and Le 2019 train with them): as constants they keep what a checkpoint learnt, and no picture depends on
its neighbours. So this is a tower to load weights into; from random weights a ViT learns better.

Shapes: I pictures, S image side in pixels, g = S / 32 positions along a side, N = g * g, C channels of the last map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn

from mmctx.encoders.vision_tower import ImageEncoderConfig, VisionTower
from mmctx.errors import ConfigError

_FAMILY = "timm.models.efficientnet"  # timm's file of the models that this tower takes


class ConvTower(VisionTower):
    """timm's `forward_features`: (I, 3, S, S) -> (I, N, C).

    Args:
        model: an EfficientNet of timm, with its weights.
        image_size: S; a multiple of 32, or the last map would hold more than S / 32 positions.
        mean: RGB mean of pixel values that the weights were trained with.
        std: their RGB standard deviation.
    """

    def __init__(self, model: Any, image_size: int, mean: tuple, std: tuple) -> None:
        super().__init__()
        self.image_size, self.patch_size = image_size, model.feature_info[-1]["reduction"]
        self.mean, self.std = mean, std
        model.reset_classifier(0, "")
        self.model: Any = freeze_batch_norm_2d(model)

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """Its stages; they are no transformer blocks, but what is kept of them can be computed again just so."""
        return self.model.blocks

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.forward_features(pixels).flatten(2).transpose(1, 2)


def convert_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a checkpoint of `efficientnet_pytorch` and its relatives (`_conv_stem.weight`, ...) under timm's names.

    Both list the same tensors in the same order, which their shapes must confirm. Other checkpoints stay as they are; tensors that the
    model has not, such as a classifier, keep their names.
    """
    if "_conv_stem.weight" not in weights:
        return dict(weights)
    found = {
        f"classifier.{name.removeprefix('_fc.')}": tensor for name, tensor in weights.items() if name.startswith("_fc.")
    }
    others = [(name, tensor) for name, tensor in weights.items() if not name.startswith("_fc.")]
    ours = [(name, tensor.shape) for name, tensor in model.state_dict().items() if not name.startswith("classifier.")]
    if [tensor.shape for _, tensor in others] != [shape for _, shape in ours]:
        return dict(weights)  # of another model: names that do not fit say so
    return found | {name: tensor for (name, _), (_, tensor) in zip(ours, others, strict=True)}


def build_conv_tower(config: ImageEncoderConfig, load: Callable[[nn.Module, str, Any], None]) -> ConvTower | None:
    """The tower of a configuration; None where it names another kind of model.

    Args:
        config: of the encoder.
        load: (model, checkpoint, conversion of its names) fills the model.

    Raises:
        ConfigError: it asks for a stem of convolutions.
    """
    known = config.name.partition(".")[0]
    if not timm.is_model(known) or timm.model_entrypoint(known).__module__ != _FAMILY:
        return None
    if config.stem != "patch":
        raise ConfigError(f"stem 'conv' is for ViTs, {config.name!r} has convolutions of its own")
    model: Any = timm.create_model(config.name, pretrained=config.pretrained is True, num_classes=0, **config.options)
    if isinstance(config.pretrained, str):
        load(model, config.pretrained, convert_names)
    size = config.image_size or model.pretrained_cfg["input_size"][-1]
    return ConvTower(model, size, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
