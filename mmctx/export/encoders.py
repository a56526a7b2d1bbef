"""Picture encoder, sound encoder and the embeddings of similarity objectives as ONNX or torch.export graphs, checked against the model.

Each file holds its weights. Pictures come in as uint8, as `ImagePreprocessor` makes them: normalisation is inside. Sounds come in as frames
of one length, as `AudioPreprocessor` makes them. `export.json` tells what goes in and out, and how far each graph is from the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.image_geometry import ImageGeometry
from mmctx.errors import ConfigError, MmctxError
from mmctx.export.graphs import Embedding, PictureEncoder, SoundEncoder
from mmctx.model import MmctxModel
from mmctx.objectives.contrastive import SimilarityLoss
from mmctx.tokenizer import TextTokenizer

Format = Literal["onnx", "torch-export"]
TOLERANCE = 1e-4
"""Largest difference from the model that a graph may have: other kernels, fp32."""


@dataclass(frozen=True, slots=True)
class Part:
    """What becomes one file.

    Attributes:
        name: of the file.
        graph: module of one input and one output.
        example: an input.
        other: an input of another size, where sizes may change.
        dynamic: dimension of the input -> its name, where it may change.
        input: what goes in, in words.
        output: what comes out.
    """

    name: str
    graph: nn.Module
    example: Tensor
    other: Tensor
    dynamic: dict[int, str]
    input: str
    output: str


def export_encoders(
    model: MmctxModel,
    tokenizer: TextTokenizer,
    out: str | Path,
    to: Format = "onnx",
    *,
    clip_seconds: float = 10.0,
    picture_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Writes every encoder and embedding that a model has into a folder, and runs each against the model.

    Args:
        model: in fp32 on the CPU, in evaluation mode.
        tokenizer: of its checkpoint.
        out: folder, made if it is not there; files in it are overwritten.
        to: `onnx` for ONNX files, run by onnxruntime to check them; `torch-export` for `.pt2` files.
        clip_seconds: length of the clips that sound graphs take.
        picture_size: height and width of the pictures, where the encoder lets them keep their shape.

    Returns:
        What `export.json` holds: for each file its input, output and `difference`, the largest one to the model on random inputs.

    Raises:
        ConfigError: there is nothing to export, a package is missing, or the model has what a graph cannot hold.
        MmctxError: a graph computes something else than the model.
    """
    run = {"onnx": _onnx, "torch-export": _torch_export}[to]
    _check(model, to)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for part in _parts(model.eval(), tokenizer, clip_seconds, picture_size):
            path = out / f"{part.name}.{'onnx' if to == 'onnx' else 'pt2'}"
            answer = run(part, path)
            difference = max(float((answer(x) - part.graph(x)).abs().max()) for x in (part.example, part.other))
            if not difference <= TOLERANCE:
                raise MmctxError(
                    f"{path}: its results differ by {difference:.2g} from the model's, more than {TOLERANCE:g}; please report it"
                )
            shape = [part.dynamic.get(n, size) for n, size in enumerate(part.example.shape)]
            found[path.name] = {
                "input": {"what": part.input, "shape": shape, "dtype": str(part.example.dtype).removeprefix("torch.")},
                "output": part.output,
                "difference": difference,
            }
    (out / "export.json").write_text(json.dumps(found, indent=2), encoding="utf-8")
    return found


def _check(model: MmctxModel, to: Format) -> None:
    wanted = ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ()
    if missing := [name for name in wanted if find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)} is not installed: pip install 'mmctx[export]'")
    if not model.encoders and not _similarities(model):
        raise ConfigError(
            "the model has no encoder of pictures or sound and no similarity objective: nothing to export"
        )
    if any(window is not None for window in model.config.transformer.windows) and _similarities(model):
        raise ConfigError(
            "model.transformer.windows: attention windows are not exported, and the embeddings of similarity objectives pass the trunk"
        )


def _similarities(model: MmctxModel) -> list[str]:
    return [name for name, half in model.objectives.items() if isinstance(half, SimilarityLoss)]


def _parts(
    model: MmctxModel, tokenizer: TextTokenizer, clip_seconds: float, picture_size: tuple[int, int] | None
) -> Iterator[Part]:
    width = model.config.transformer.width
    media: dict[str, Part] = {}
    columns = None
    if "image" in model.encoders:
        pixels, columns = _pictures(model, picture_size)
        graph = PictureEncoder(model)
        output = f"(pictures, {graph(pixels).shape[1]}, {width}) embeddings for the trunk"
        media["image"] = Part("image_encoder", graph, pixels[:2], pixels, {0: "pictures"}, "RGB pixels", output)
    if "audio" in model.encoders:
        frames, tokens = _clip(model, clip_seconds)
        output = f"({tokens}, {width}) embeddings for the trunk"
        about = f"frames of one clip of {clip_seconds:g} s"
        media["audio"] = Part(
            "sound_encoder", SoundEncoder(model, tokens), frames, torch.randn_like(frames), {}, about, output
        )
    yield from media.values()
    for objective in _similarities(model):
        config: Any = model.objectives[objective].config
        kinds = {view.rstrip("0123456789") for view in config.views}
        embed_id = tokenizer.embed_id
        unit = "unit embeddings"
        for kind in sorted(kinds & media.keys()):
            part = media[kind]
            graph = Embedding(model, objective, embed_id, part.graph, columns if kind == "image" else None)  # type: ignore[arg-type]
            yield Part(f"{objective}_{kind}", graph, part.example, part.other, part.dynamic, part.input, unit)
        if kinds - media.keys() - {"image", "audio"}:
            ids = torch.randint(len(tokenizer), (3, 9))
            graph = Embedding(model, objective, embed_id)
            names = {0: "texts", 1: "tokens"}
            yield Part(
                f"{objective}_text", graph, ids[:2, :5].clone(), ids, names, "token ids of texts of one length", unit
            )


def _pictures(model: MmctxModel, size: tuple[int, int] | None) -> tuple[Tensor, int]:
    """(3, 3, H, W) random pictures, and the columns of their grid."""
    geometry: ImageGeometry = model.encoders["image"].geometry  # type: ignore[assignment]
    if not geometry.dynamic:
        size = (geometry.image_size, geometry.image_size)
    if size is None:
        raise ConfigError(
            "pictures keep their shape (model.image.max_patches): say which height and width the graph is for"
        )
    rows, columns = (int(side[0]) for side in geometry.sizes(np.array([size[1]]), np.array([size[0]])))
    if (rows * geometry.unit, columns * geometry.unit) != tuple(size):
        raise ConfigError(
            f"pictures of {size[0]} x {size[1]} would be resized to {rows * geometry.unit} x {columns * geometry.unit}: "
            "name that size"
        )
    return torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8), columns


def _clip(model: MmctxModel, seconds: float) -> tuple[Tensor, int]:
    """Random frames (F, M) of a clip of this length, and its embeddings."""
    config = model.encoders["audio"].config  # type: ignore[union-attr]
    item = AudioPreprocessor(config)(torch.zeros(max(round(seconds * config.sample_rate), 1)), config.sample_rate)  # type: ignore[union-attr]
    return torch.randn_like(item.values), item.num_tokens


def _program(part: Part) -> ExportedProgram:
    shapes = ({dim: Dim(name, min=1) for dim, name in part.dynamic.items()} or None,)
    return torch.export.export(part.graph, (part.example,), dynamic_shapes=shapes, strict=False)


def _torch_export(part: Part, path: Path) -> Callable[[Tensor], Tensor]:
    torch.export.save(_program(part), path)
    return torch.export.load(path).module()


def _onnx(part: Part, path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    program = torch.onnx.export(
        _program(part), input_names=["input"], output_names=["output"], dynamo=True, verbose=False
    )
    assert program is not None
    program.save(str(path), external_data=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
