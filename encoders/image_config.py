"""The config of a picture encoder, and what it takes over from folders that its weights come from.

What a folder says is read when the config is built, and stands in it from then on: a checkpoint needs the folder no more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mmctx.config import StrictModel
from mmctx.encoders.projector import ProjectorKind
from mmctx.encoders.transformers_folder import model_type, read_json
from mmctx.errors import ConfigError

Resize = Literal["crop", "squash", "pad"]
Interpolation = Literal["bicubic", "bilinear"]
VISION_TYPES = ("clip_vision_model", "siglip_vision_model", "vit")
"""Types of Transformers models that can be a tower."""


class ImageEncoderConfig(StrictModel):
    """A picture encoder: a ViT or an EfficientNet by name, an optional reduction of its tokens, a projector."""

    kind: Literal["timm", "open_clip", "transformers"] = "timm"
    """Library that the tower comes from."""
    name: str = "vit_tiny_patch16_224"
    """The library's name of the model; timm and open_clip also take `local-dir:FOLDER` and `hf-hub:ORG/REPO`. With transformers the folder
    in `pretrained` says all."""
    pretrained: bool | str = False
    """False: random weights. True: the library's own (download, or the folder of a `local-dir:` name). A string: a checkpoint file, one of
    open_clip's tags, or the folder of a Transformers model (CLIP, SigLIP, ViT)."""
    image_size: int | None = Field(default=None, ge=1)
    """Side of the square picture in pixels; the tower's own if null. Checkpoints' position embeddings are resampled."""
    max_patches: int | None = Field(default=None, ge=1)
    """Not a square for all: each picture keeps its shape, and its size as long as it has no more patches than this (NaFlex; Dehghani et al.
    2023). The number of its embeddings follows from width and height. For timm's `naflexvit_*`, ViT and EVA models, and `transformers`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of `timm.create_model` (embed_dim, depth, num_heads, patch_size ...), keys of open_clip's
    `vision_cfg` (width, layers, head_width, patch_size ...) or of a Transformers config."""
    stem: Literal["patch", "conv"] = "patch"
    """`patch`: the tower's own patch embedding. `conv`: overlapping 3x3 convolutions of stride 2 (timm only)."""
    shuffle: int = Field(default=1, ge=1)
    """r: pixel shuffle merges r x r neighbouring tokens into one."""
    projector: ProjectorKind = "mlp"
    """How features become embeddings: `linear` or two layers (`mlp`)."""
    resize: Resize | None = None
    """How a picture becomes square: `crop` its middle, `squash` it, or `pad` it with black; the tower's own if null."""
    interpolation: Interpolation | None = None
    """How pixels are resampled, always antialiased; the tower's own if null."""
    mean: tuple[float, float, float] | None = None
    """RGB mean of pixel values in 0..1; the tower's own if null."""
    std: tuple[float, float, float] | None = None
    """RGB standard deviation of pixel values in 0..1; the tower's own if null."""

    @model_validator(mode="before")
    @classmethod
    def _from_folder(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        try:
            return _resolved(given)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _check(self) -> ImageEncoderConfig:
        if self.kind == "transformers" and "model_type" not in self.options:
            raise ValueError(
                "kind 'transformers' needs `pretrained: FOLDER`, or all of a vision config with its model_type in `options`"
            )
        if self.max_patches is not None and self.max_patches < self.shuffle**2:
            raise ValueError(
                f"max_patches {self.max_patches} is less than one embedding of shuffle {self.shuffle}: {self.shuffle**2}"
            )
        if self.max_patches is not None and self.image_size is not None:
            raise ValueError(
                "image_size makes all pictures square and max_patches leaves them their shape: set one of them"
            )
        if self.max_patches is not None and self.stem == "conv":
            raise ValueError("stem 'conv' takes pictures of one size: leave out max_patches")
        return self


def _resolved(given: dict[str, Any]) -> dict[str, Any]:
    """With what the named folder says, below what the config says itself."""
    kind, name, pretrained = given.get("kind", "timm"), given.get("name"), given.get("pretrained", False)
    if kind == "transformers" and isinstance(pretrained, str) and "model_type" not in (given.get("options") or {}):
        found = _read_transformers(pretrained)
    elif kind == "timm" and isinstance(name, str) and name.startswith("local-dir:"):
        found = _read_timm(name.removeprefix("local-dir:"), pretrained)
        given = {**given, "name": found.pop("name"), "pretrained": found.pop("pretrained")}
    elif kind == "open_clip" and isinstance(name, str) and name.startswith("local-dir:") and not given.get("options"):
        found = _read_open_clip(name.removeprefix("local-dir:"))
    elif kind == "open_clip" and isinstance(pretrained, str) and any(given.get(key) is None for key in _PREPROCESSING):
        found = {"options": {}, **_preprocessing_of_tag(str(name), pretrained)}
    else:
        return given
    options = {**found.pop("options"), **(given.get("options") or {})}
    return {**found, **{key: value for key, value in given.items() if value is not None}, "options": options}


def _read_transformers(folder: str) -> dict[str, Any]:
    _, config = model_type(folder, ["clip", "siglip", *VISION_TYPES])
    vision = config.get("vision_config", config)
    if vision.get("model_type") not in VISION_TYPES:
        raise ConfigError(
            f"pretrained: {folder}: its vision model is of type {vision.get('model_type')!r}, not of {VISION_TYPES}"
        )
    left_out = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "projection_dim"}
    front = read_json(folder, "preprocessor_config.json")
    cut = front.get("do_center_crop", False) or "shortest_edge" in front.get("size", {})
    return {
        "name": Path(folder).name,
        "options": {key: value for key, value in vision.items() if key not in left_out},
        "mean": tuple(front["image_mean"]),
        "std": tuple(front["image_std"]),
        "resize": "crop" if cut else "squash",
        "interpolation": {2: "bilinear", 3: "bicubic"}.get(front.get("resample", 3), "bicubic"),  # numbers of Pillow
    }


def _read_timm(folder: str, pretrained: bool | str) -> dict[str, Any]:
    """A folder that `timm.models.push_to_hf_hub` or `save_for_hf` wrote."""
    config = read_json(folder, "config.json")
    of_weights = config.get("pretrained_cfg", config)
    files = [Path(folder) / name for name in ("model.safetensors", "pytorch_model.bin")]
    weights = next((str(path) for path in files if path.exists()), str(files[0])) if pretrained is True else pretrained
    found = {
        "name": config["architecture"],
        "pretrained": weights,
        "options": config.get("model_args") or {},
        **_preprocessing(of_weights, TIMM_RESIZE, "crop_mode"),
    }
    for key in ("num_classes", "in_chans", "global_pool"):  # of the classifier that is thrown away
        found["options"].pop(key, None)
    return found


def _read_open_clip(folder: str) -> dict[str, Any]:
    """A folder that `open_clip.push_to_hf_hub` or `save_for_hf` wrote."""
    config = read_json(folder, "open_clip_config.json")
    model = config["model_cfg"]
    options = {**model["vision_cfg"], "quick_gelu": model.get("quick_gelu", False)}
    return {"options": options, **_preprocessing(config.get("preprocess_cfg", {}), OPEN_CLIP_RESIZE, "resize_mode")}


def _preprocessing_of_tag(name: str, tag: str) -> dict[str, Any]:
    """How pictures were prepared for weights that open_clip knows by a tag; nothing if it is a file."""
    try:
        from open_clip import get_pretrained_cfg  # 2 to 3 seconds; a config that was resolved before does not come here
    except ImportError:  # building the tower will say so
        return {}
    return _preprocessing(get_pretrained_cfg(name, tag), OPEN_CLIP_RESIZE, "resize_mode")


def _preprocessing(about: dict[str, Any], resize: dict[str, Resize], mode: str) -> dict[str, Any]:
    """Keys of our config from those of a library, where it says something."""
    found: dict[str, Any] = {key: tuple(about[key]) for key in ("mean", "std") if about.get(key)}
    if about.get(mode) in resize:
        found["resize"] = resize[about[mode]]
    if about.get("interpolation") in ("bicubic", "bilinear"):
        found["interpolation"] = about["interpolation"]
    return found


TIMM_RESIZE: dict[str, Resize] = {"center": "crop", "squash": "squash", "border": "pad"}
OPEN_CLIP_RESIZE: dict[str, Resize] = {"shortest": "crop", "squash": "squash", "longest": "pad"}
"""The libraries' names of what `resize` says."""
_PREPROCESSING = ("resize", "interpolation", "mean", "std")
