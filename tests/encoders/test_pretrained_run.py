"""Whole runs with encoders that bring their weights: trained, audited, frozen, and read again where the folders are gone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sound_models import save_ast, save_whisper
from tiny import png, write_shard

from mmctx import api
from mmctx.audit import audit_batch, other_modes, own_mode
from mmctx.config import build_config
from mmctx.datasets.assemble import build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.pack import pack_documents
from mmctx.train.audit import choose_documents
from mmctx.train.checkpoints.load import load_model
from mmctx.train.config import RunConfig
from mmctx.train.loop import train


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    import transformers

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.SiglipVisionConfig(**shape, image_size=32, patch_size=16)
    transformers.SiglipVisionModel(vision).save_pretrained(tmp_path / "siglip")
    transformers.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "siglip")
    save_whisper(tmp_path / "whisper")
    save_ast(tmp_path / "ast")
    return {name: tmp_path / name for name in ("siglip", "whisper", "ast")}


def with_encoders(tree: dict[str, Any], folders: dict[str, Path], sound: str, **changes: Any) -> RunConfig:
    tree["model"]["image"] = {"kind": "transformers", "pretrained": str(folders["siglip"])}
    tree["model"]["audio"] = {"kind": sound, "pretrained": str(folders[sound]), "shuffle": 2}
    tree["train"] |= {"steps": 2, "save_every": 2, **changes}
    tree["eval"] = {"sources": {}}
    return build_config(RunConfig, tree, "tree")


@pytest.mark.slow
def test_a_checkpoint_brings_the_weights(tree: dict[str, Any], folders: dict[str, Path]) -> None:
    """Frozen encoders stay as they were in their folders; then the folders go, and the run is loaded, goes on and is audited."""
    freeze = {"encoders.audio": {"freeze": True}, "encoders.audio.projector": {"freeze": False}}
    config = with_encoders(tree, folders, "whisper", modules=freeze)
    before = api.build_model(config, api.build_dataset(config)).encoders["audio"].state_dict()
    run_dir = train(config).run_dir
    for folder in folders.values():
        shutil.rmtree(folder)
    written = api.export_encoders(run_dir, run_dir / "graphs", "torch-export", clip_seconds=0.5)
    assert {"image_encoder.pt2", "sound_encoder.pt2", "similarity_text.pt2"} <= written.keys()
    model, _, loaded = load_model(run_dir)
    assert loaded.model.audio == config.model.audio
    after = model.encoders["audio"].state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"projector"}
    tree["model"]["audio"] = config.model.audio.model_dump(mode="json")
    tree["model"]["image"] = config.model.image.model_dump(mode="json")
    tree["train"]["steps"] = 3
    assert train(build_config(RunConfig, tree, "tree")).step == 3


@pytest.mark.slow
@pytest.mark.parametrize("sound", ["whisper", "ast"])
def test_no_item_sees_another(tree: dict[str, Any], folders: dict[str, Path], sound: str, tmp_path: Path) -> None:
    """Pictures of several shapes and sizes beside clips, in every mode that runs here."""
    shapes = [(32, 32), (16, 48), (48, 16), (32, 64)]
    samples = [
        {"__key__": f"{n}", "png": resized(png(n, 64), shapes[n % 4]), "flac": clip(n), "txt": b"red cat"}
        for n in range(12)
    ]
    shard = write_shard(tmp_path / "shapes.tar", samples)
    tree["data"]["sources"] = {"triples": tree["data"]["sources"]["triples"] | {"shards": str(shard), "texts": ["txt"]}}
    tree["objectives"]["similarity"]["pairs"] = [["image", "text0"], ["audio", "text0"]]
    tree["model"]["transformer"] |= {"picture_positions": "grid", "head_dim": 8}
    config = with_encoders(tree, folders, sound)
    image = config.model.image.model_copy(update={"max_patches": 6})
    config = config.model_copy(update={"model": config.model.model_copy(update={"image": image})})
    data = build_data(config.data, config.data.sources, config.model, config.objectives, seed=0)
    documents = choose_documents(data, Plan(config.data, data.tables, 0), 1, 250, torch.device("cpu"))
    batch = pack_documents(documents, data.tokenizer.placeholder_ids)
    assert len(set(batch.media["image"].sizes)) > 1
    model = api.build_model(config, data)
    own = own_mode(model, "fp32", torch.device("cpu"))
    others, _ = other_modes(own, model, torch.device("cpu"))
    report = audit_batch(model, batch, documents, modes=[own, *others[:2]])
    assert report.ok, report
    assert {"patch", "frame"} <= {row.perturbation for row in report.rows.values()}


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(data)).resize(size).save(out, "PNG")
    return out.getvalue()


def clip(seed: int) -> bytes:
    from tiny import flac

    return flac(seed, 0.2 + 0.3 * (seed % 3))
