"""Folders of runs with results of every suite, made up in the shapes that the suites document."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mmctx.config import build_config
from mmctx.train.config import RunConfig

ATTACK = "<script>alert('x')</script>"


EXAMPLES = [
    {
        "kind": kind,
        "key": "triple1000",
        "reference": f"red {ATTACK}",
        "prediction": "red cat",
        "location": ["heldout", 0],
    }
    for kind in ("image", "audio")
]
"""Of the tiny corpus, so that their media are there."""


def score(share: float, n: int = 40) -> dict[str, float]:
    """As suites over lengths give it."""
    half = 1.96 * math.sqrt(share * (1 - share) / n)
    names = {"share": share, "exact": share, "low": max(share - half, 0), "high": min(share + half, 1)}
    return {**names, "complete": share, "candidates": share, "log_prob": -1.0, "chance": 0.1, "n": n}


def grid(kinds: tuple[str, ...], lengths: tuple[int, ...], edge: int) -> dict[str, Any]:
    """Of `needle`, `passkey` and `world`: near 1 up to `edge` tokens."""
    shares = {str(length): score(0.97 if length <= edge else 0.97 * edge / length) for length in lengths}
    depths = ("0", "0.25", "0.5", "0.75", "1")
    heat = {
        length: {depth: score(found["share"] * (0.7 + 0.3 * float(depth))) for depth in depths}
        for length, found in shares.items()
    }
    effective = {rule: {"length": edge, "low": edge // 2, "high": edge} for rule in ("ruler", "strict", "exact")}
    kind = {
        "lengths": shares,
        "heat": heat,
        "effective": effective,
        "controls": {"removed": score(0.1), "alone": score(1.0)},
    }
    example = {
        "kind": kinds[0],
        "length": lengths[0],
        "question": f"What? {ATTACK}",
        "references": ["7"],
        "prediction": "8",
        "choice": "7",
    }
    return {
        "kinds": dict.fromkeys(kinds, kind),
        "lengths": {
            length: {"share": found["share"], "exact": found["share"], "kinds": len(kinds)}
            for length, found in shares.items()
        },
        "effective": effective,
        "grid": {"lengths": list(lengths), "depths": [0, 0.5, 1], "samples": 4, "haystack": "noise"},
        "examples": [example],
        "left_out": [{"kind": "sound", "length": None, "reason": "the model has no encoder of sound"}],
    }


def attribution() -> dict[str, Any]:
    """Of a picture's document of the tiny corpus: 4 tokens, the last of which speaks for the answer."""
    shares = {"integrated": 1.0, "gradient": 1.0, "attention": 1.0}
    example = {"kind": "image", "objective": "captioning", "key": "triple1000", "location": ["heldout", 0, 0], "cut": 4}
    example |= {
        "prediction": ATTACK,
        "reference": "red",
        "log_prob": -1.0,
        "baseline": -3.0,
        "gap": 0.01,
        "media": shares,
    }
    example |= {"media_tokens": 1.0, "scores": dict.fromkeys(shares, "-500 0 10 999")}
    return {
        "by_kind": {
            "image": {**shares, "media_tokens": 1.0, "gap": 0.01, "n": 1},
            "interleaved": {**dict.fromkeys(shares, 0.6), "media_tokens": 0.4, "gap": 0.02, "n": 1},
        },
        "examples": [example],
    }


def all_results(edge: int = 1024) -> dict[str, Any]:
    """Results of every suite in their documented shapes; `edge` tells runs apart."""
    lengths = (256, 512, 1024, 2048, 4096)
    recall = {"R@1": 0.25, "R@5": 0.5, "R@10": 0.75, "MRR": 0.4, "n": 16, "candidates": 20, "positives": 1.2}
    recall |= {"chance": {"R@1": 0.0125, "R@5": 0.25, "R@10": 0.5, "MRR": 0.2}, "interval": {"R@1": [0.1, 0.4]}}
    band = {"mean": [3.0, 2.5, 2.0], "low": [2.9, None, 1.9], "high": [3.1, None, 2.1], "n": [10, 10, 10]}
    excess = {"kept": [16, 64, 256], "mean": [3.0, 2.5, 2.2], "excess": [1.0, 0.5, 0.1], "excess_low": [0.9, 0.4, 0.0]}
    excess |= {"excess_high": [1.1, 0.6, 0.2], "documents": [5, 5, 5]}
    at = {
        str(length): {"all": score(0.9), "recall": score(0.9), "depths": {"0-0.5": score(0.8), "0.5-1": score(1.0)}}
        for length in lengths
    }
    f1 = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "n": 20}
    classes = {"accuracy": 0.75, "low": 0.6, "high": 0.86, "macro_f1": 0.74, "n": 40, "classes": ["good", ATTACK]}
    classes |= {"majority": {"accuracy": 0.5, "low": 0.35, "high": 0.65, "macro_f1": 0.33, "class": "good"}}
    classes |= {"per_class": {"good": f1, ATTACK: f1}, "confusion": [[15, 5], [5, 15]]}
    correlation, error = {"value": 0.8, "low": 0.6, "high": 0.9}, {"mean": 1.5, "low": 1.2, "high": 1.8, "n": 40}
    numbers = {"pearson": correlation, "spearman": correlation, "mse": error, "mse_of_mean": error, "r2": 0.4, "n": 40}
    known = {"accuracy": 0.8, "low": 0.7, "high": 0.9}
    probe = {"linear": known | {"C": 0.1}, "1-NN": known, "5-NN": known}
    curve = {"R@1": [0.5, 0.3, 0.1], "R@10": [0.9, 0.7, 0.2], "chance": {"R@1": 0.05, "R@10": 0.5}, "n": 20}
    curve["interval"] = {cut: [[y - 0.1, y + 0.1] for y in curve[cut]] for cut in ("R@1", "R@10")}
    top = {"top1": [0.9, 0.8, 0.4], "low": [0.8, 0.7, 0.3], "high": [1.0, 0.9, 0.5], "chance": 0.1, "n": 20}
    caption = {f"image_{name}": 0.5 for name in ("cer", "wer", "exact", "bleu_4", "rouge_l")}
    return {
        "retrieval": {"image_to_text": recall, "text_to_image": recall},
        "zero_shot": {
            "image/similarity": {
                "top1": 0.5,
                "low": 0.4,
                "high": 0.6,
                "top5": 0.9,
                "mean_per_class": 0.5,
                "chance": 0.1,
                "n": 50,
            }
            | {"per_class": {"cat": 0.4, ATTACK: 0.6}}
        },
        "caption": caption
        | {"image_cider": 1.2, "image_n": 60, "examples": EXAMPLES, "left_out": {"audio_cider": "12 captions"}},
        "masked_lm": {"accuracy": 0.5, "n": 40},
        "next_sentence": {"accuracy": 0.75, "n": 40},
        "classification": {"mood": classes},
        "regression": {"stars": numbers},
        "swapped_media": {
            "captioning": {
                "own": 2.0,
                "swapped": 3.0,
                "excess": 1.0,
                "low": 0.8,
                "high": 1.2,
                "n": 100,
                "documents": 10,
            }
        },
        "sts": {"en": {"spearman": 0.82, "low": 0.8, "high": 0.84, "n": 1379}},
        "probe": {
            "image": {"input": probe, "trunk": probe, "embedding": probe, "label": ATTACK, "classes": 10}
            | {"n_train": 500, "n": 250, "unseen": 1, "chance": 0.1, "majority": 0.15}
        },
        "robustness": {
            "severities": [0, 1, 5],
            "levels": {"image/noise": [0.08, 0.38], "image/blur": [1, 6], "audio/speed": [1.1, 2.0]},
            "retrieval": {f"image/{name}": {"image_to_text": curve} for name in ("noise", "blur")},
            "zero_shot": {"audio/speed": {"audio/captioning": top}},
        },
        "attribution": attribution(),
        "loss_by_position": {
            "modalities": {name: {"edges": [[0, 16], [16, 32], [32, 64]], **band} for name in ("all", "image")},
            "truncation": excess,
            "shuffle": excess,
        },
        "needle": grid(("single", "multi_key", "picture"), lengths, edge),
        "passkey": grid(("passkey",), lengths, edge),
        "world": grid(("before", "count"), lengths, edge),
        "knowledge": {
            "put": known | {"cited": 1.0},
            "changed": known | {"cited": 0.9, "stale": 0.05},
            "removed": known | {"accuracy": 0.02, "low": 0.0, "high": 0.1, "cited": 0.0, "stale": 0.0},
            "without": known | {"accuracy": 0.04, "low": 0.0, "high": 0.12},
            "chance": 0.03125,
            "n": 80,
        },
        "memory_recall": {
            "window": 32,
            "reach": 32,
            "distances": {
                str(n): {
                    mode: {"all": score(share), "needle": score(share)} for mode, share in (("on", 0.9), ("off", 0.1))
                }
                for n in (0, 1, 2, 4)
            },
        },
        "recall": {
            "lengths": at,
            "controls": {"alone": score(1.0), "removed": score(0.1)},
            "heat": {"needle": {n: found["depths"] for n, found in at.items()}},
        },
    }


def write_run(folder: Path, tree: dict[str, Any], *, edge: int = 1024, steps: int = 60, rate: float = 1e-3) -> Path:
    """A run's folder with results of every suite, of two evaluations, and curves that fall."""
    folder.mkdir(parents=True)
    config = build_config(RunConfig, tree, "test").model_dump(mode="json")
    config["train"]["optimizer"]["lr"] = rate
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "manifest.json").write_text(
        json.dumps({"parameters": 1_234_567, "samples": 48, "device": "cpu", "processes": 1, "python": "3"})
    )
    rng, lines = np.random.default_rng(edge), []
    for step in range(1, steps + 1):
        loss = 8 * math.exp(-step / steps * 2) + 0.2 * rng.standard_normal()
        lines.append(
            {
                "step": step,
                "loss": loss,
                "loss/captioning": loss,
                "loss/similarity": loss / 2,
                "lr": rate,
                "grad_norm": 1.0,
            }
        )
        lines[-1] |= {
            "tokens": 100 * step,
            "tokens/text": 60 * step,
            "tokens/image": 40 * step,
            "samples": step,
            "skipped": 2,
        }
        lines[-1] |= {"tokens_per_s": 1e4, "fill": 0.97, "data_wait": 0.02, "batch_fingerprint": "aa"}
        if step % 20 == 0:
            lines.append({"step": step, "eval/loss/captioning/held_out": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    skip = {"step": 1, "source": "s", "shard": "a/b.tar", "key": ATTACK, "reason": "empty", "detail": ATTACK}
    (folder / "skips.jsonl").write_text(json.dumps(skip) + "\n")
    about = {"tokens": 100 * steps, "weights": "trained", "train_seconds": 75.0, "skipped": {"empty": 1}}
    entries = [
        {"step": steps // 2, **about, **all_results(edge)},
        {"step": steps, **about, "loss": {"captioning": {"held_out": 1.5, "n": 70}}},
    ]
    (folder / "eval.json").write_text(json.dumps({"evaluations": entries}))
    return folder
