"""Encoders and embeddings as graphs: what onnxruntime and torch.export compute equals the model as it is evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmctx.config import build_config
from mmctx.encoders.audio_front_end import AudioPreprocessor
from mmctx.encoders.image import ImagePreprocessor
from mmctx.errors import ConfigError, MmctxError
from mmctx.export import encoders
from mmctx.export.encoders import export_encoders
from mmctx.model import MmctxModel
from mmctx.objectives import build_data_halves
from mmctx.pack import pack_documents
from mmctx.sample import Sample
from mmctx.tokenizer import TextTokenizer
from mmctx.train.build import build_model
from mmctx.train.config import RunConfig


def build(tree: dict[str, Any]) -> tuple[MmctxModel, TextTokenizer, RunConfig]:
    config = build_config(RunConfig, tree, "tree")
    tokenizer = TextTokenizer(config.data.tokenizer)
    return build_model(config, len(tokenizer)).eval(), tokenizer, config


def run_onnx(path: Path, given: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"input": given.numpy()})[0])


@pytest.mark.slow
def test_onnx_files_embed_as_the_model_does(tree: dict[str, Any], tmp_path: Path) -> None:
    """From pixels, a waveform and words, by packing on the one side and by the files on the other."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    model, tokenizer, config = build(tree)
    found = export_encoders(model, tokenizer, tmp_path, "onnx", clip_seconds=0.5)
    names = ["image_encoder", "sound_encoder", "similarity_audio", "similarity_image", "similarity_text"]
    assert sorted(found) == sorted(f"{name}.onnx" for name in names)
    assert json.loads((tmp_path / "export.json").read_text()) == found
    assert found["image_encoder.onnx"]["input"] == {
        "what": "RGB pixels",
        "shape": ["pictures", 3, 32, 32],
        "dtype": "uint8",
    }

    generator = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=generator)
    picture = ImagePreprocessor(config.model.image)(pixels)
    clip = AudioPreprocessor(config.model.audio)(torch.randn(8000, generator=generator) * 0.1, 16_000)
    text = tokenizer.encode("red round cat and a very tall house")
    half = build_data_halves(config.objectives, tokenizer)["similarity"]
    sample = Sample("a", "s", 1, (text, text[:3]), image=picture, audio=clip)
    batch = pack_documents(half.documents(sample, np.random.default_rng(0)), tokenizer.placeholder_ids)
    with torch.no_grad():
        embedded = model.objectives["similarity"].embed_batch(model.encode(batch), batch)
        rows = model.encoders["image"](batch.media["image"])
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(run_onnx(tmp_path / "image_encoder.onnx", picture.values[None])[0], rows, **close)
    for view, given in (
        ("image", picture.values[None]),
        ("audio", clip.values),
        ("text0", torch.from_numpy(text)[None]),
        ("text1", torch.from_numpy(text[:3])[None]),
    ):
        answer = run_onnx(tmp_path / f"similarity_{view.rstrip('01')}.onnx", given)
        torch.testing.assert_close(answer, embedded[f"similarity/{view}"], **close)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "pooling"), [("whisper", "token"), ("ast", "mean")])
def test_pretrained_kinds_and_pictures_of_any_shape(
    tree: dict[str, Any], tmp_path: Path, kind: str, pooling: str
) -> None:
    """A clip of two chunks; grid positions; grouped heads."""
    tree["objectives"]["similarity"]["pooling"] = pooling
    shape = {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 24}
    sizes = {"whisper": {"num_mels": 20, "max_positions": 20}, "ast": {"num_mels": 36, "max_frames": 36}}
    tree["model"]["audio"] = {"kind": kind, **shape, **sizes[kind]}
    tree["model"]["image"] |= {"image_size": None, "max_patches": 12}
    tree["model"]["transformer"] |= {"picture_positions": "grid", "head_dim": 8}
    model, tokenizer, _ = build(tree)
    with pytest.raises(ConfigError, match="say which height and width"):
        export_encoders(model, tokenizer, tmp_path, "torch-export")
    with pytest.raises(ConfigError, match="100 x 48 would be resized to 80 x 32"):
        export_encoders(model, tokenizer, tmp_path, "torch-export", picture_size=(100, 48))
    found = export_encoders(model, tokenizer, tmp_path, "torch-export", clip_seconds=0.6, picture_size=(32, 48))
    assert found["image_encoder.pt2"]["input"]["shape"] == ["pictures", 3, 32, 48]
    assert max(file["difference"] for file in found.values()) < 1e-5


def test_what_cannot_be_exported_says_why(
    tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["model"]["transformer"]["windows"] = [4, None]
    model, tokenizer, _ = build(tree)
    with pytest.raises(ConfigError, match="attention windows are not exported"):
        export_encoders(model, tokenizer, tmp_path, "torch-export")
    tree["model"] |= {"image": None, "audio": None}
    tree["objectives"] = {"captioning": {"kind": "captioning"}}
    for source in tree["data"]["sources"].values():
        source["objectives"] = ["captioning"]
    tree["eval"] = {"sources": {}}
    model, tokenizer, _ = build(tree)
    with pytest.raises(ConfigError, match="nothing to export"):
        export_encoders(model, tokenizer, tmp_path, "torch-export")
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnxruntime is not installed: pip install 'mmctx\[export\]'"):
        export_encoders(model, tokenizer, tmp_path, "onnx")


def test_a_graph_that_differs_is_refused(tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree["model"]["audio"] = None
    tree["objectives"] = {"captioning": {"kind": "captioning"}}
    for source in tree["data"]["sources"].values():
        source["objectives"] = ["captioning"]
    tree["eval"] = {"sources": {}}
    model, tokenizer, _ = build(tree)
    monkeypatch.setattr(encoders, "_torch_export", lambda part, path: lambda x: part.graph(x) + 1e-3)
    with pytest.raises(MmctxError, match=r"differ by 0\.001 from the model's"):
        export_encoders(model, tokenizer, tmp_path, "torch-export")
