"""The loop as a user meets it: resume, kill, signals, ledger, ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import damaged

from mmctx.config import build_config
from mmctx.datasets.assemble import RunData, build_data
from mmctx.datasets.planning.plan import Plan
from mmctx.errors import CheckpointError, ConfigError, DataError, SkipBudgetError
from mmctx.eval import packages
from mmctx.jsonl import read_lines
from mmctx.train import preflight
from mmctx.train.checkpoints.layout import list_checkpoints, resolve_checkpoint
from mmctx.train.checkpoints.load import load_model
from mmctx.train.checkpoints.manifest import seal
from mmctx.train.config import RunConfig
from mmctx.train.loop import train
from mmctx.train.optim import learning_rate, update
from mmctx.train.replay import replay

pytestmark = pytest.mark.slow

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")


def build(tree: dict[str, Any], name: str, **train_keys: Any) -> RunConfig:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["train"] |= train_keys
    return build_config(RunConfig, tree, "tree")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(resolve_checkpoint(run_dir) / "model.safetensors")


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def launch(tree: dict[str, Any], tmp_path: Path, name: str, *prefix: str, **train_keys: Any) -> subprocess.Popen:
    tree = json.loads(json.dumps(tree))
    tree["run"]["name"] = name
    tree["train"] |= train_keys
    tree["eval"]["sources"] = {}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, *(prefix or ["-m"]), "mmctx.train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"{path} did not appear: {process.communicate()[1][-2000:]}")
        time.sleep(0.02)


def test_a_run_killed_and_resumed_ends_bitwise_equal(tree: dict[str, Any], tmp_path: Path) -> None:
    """With dropout on; SIGKILL comes at some instant after the first checkpoint, while more are being written."""
    whole = train(build(tree, "whole", steps=12, save_every=2))
    killed = launch(tree, tmp_path, "killed", steps=12, save_every=2)
    run_dir = Path(tree["run"]["dir"]) / "killed"
    wait_for(run_dir / "checkpoint-4", killed)
    killed.kill()
    killed.communicate()
    assert 4 <= int(list_checkpoints(run_dir)[-1].name.removeprefix("checkpoint-")) <= 12
    resumed = train(build(tree, "killed", steps=12, save_every=2))
    assert resumed.step == 12
    assert_same(weights(whole.run_dir), weights(run_dir))
    lines = [read_lines(d / "metrics.jsonl") for d in (whole.run_dir, run_dir)]
    assert [line["step"] for line in lines[1]] == list(range(1, 13))
    for ours, theirs in zip(*lines, strict=True):
        assert {k: v for k, v in ours.items() if k.startswith("loss")} == {
            k: v for k, v in theirs.items() if k.startswith("loss")
        }


def test_metrics_lines_have_what_scripts_rely_on(tree: dict[str, Any]) -> None:
    result = train(build(tree, "metrics", steps=2))
    for line in read_lines(result.run_dir / "metrics.jsonl"):
        assert {"step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s"} <= line.keys()
        assert {"loss/captioning", "loss/masked_lm", "loss/similarity"} <= line.keys()
    checkpoint = result.run_dir / "latest"
    assert {"config.json", "model.safetensors", "tokenizer.json", "COMPLETE"} <= {p.name for p in checkpoint.iterdir()}
    assert (result.run_dir / "config.yaml").exists()


def test_loss_falls(tree: dict[str, Any]) -> None:
    tree["train"]["optimizer"] = {"lr": 3e-3}
    lines = read_lines(train(build(tree, "falls", steps=40)).run_dir / "metrics.jsonl")
    for name in ("captioning", "masked_lm", "similarity"):
        assert lines[-1][f"loss/{name}"] < 0.9 * lines[0][f"loss/{name}"], name


def test_ctrl_c_saves_and_exits_with_its_own_code(tree: dict[str, Any], tmp_path: Path) -> None:
    process = launch(tree, tmp_path, "stopped", steps=100_000, save_every=100_000)
    run_dir = Path(tree["run"]["dir"]) / "stopped"
    wait_for(run_dir / "metrics.jsonl", process)
    while not read_lines(run_dir / "metrics.jsonl"):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors[-2000:]
    (checkpoint,) = list_checkpoints(run_dir)
    assert int(checkpoint.name.removeprefix("checkpoint-")) == read_lines(run_dir / "metrics.jsonl")[-1]["step"]


def test_the_line_of_a_stop_between_two_lines_names_its_batch_too(tree: dict[str, Any], monkeypatch) -> None:
    def rate(step: int, *rest) -> float:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        return learning_rate(step, *rest)

    monkeypatch.setattr(update, "learning_rate", rate)
    result = train(build(tree, "between", log_every=4, save_every=4))
    assert (result.step, result.interrupted) == (2, True)
    (line,) = read_lines(result.run_dir / "metrics.jsonl")
    assert line["batch_fingerprint"] == replay(result.run_dir, 2).fingerprint


@pytest.mark.parametrize("wish", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_reaches_loader_workers_too_and_still_saves(
    tree: dict[str, Any], tmp_path: Path, wish: signal.Signals
) -> None:
    tree["data"]["num_workers"] = 2
    process = launch(tree, tmp_path, "group", steps=100_000, save_every=100_000)
    run_dir = Path(tree["run"]["dir"]) / "group"
    wait_for(run_dir / "metrics.jsonl", process)
    while not read_lines(run_dir / "metrics.jsonl"):
        time.sleep(0.05)
    os.killpg(process.pid, wish)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + wish, errors[-2000:]
    assert list_checkpoints(run_dir)


def test_other_precisions_and_recomputed_activations_in_one_process(tree: dict[str, Any]) -> None:
    plain = read_lines(train(build(tree, "fp32", steps=2)).run_dir / "metrics.jsonl")
    rough = read_lines(train(build(tree, "bf16", steps=2, precision="bf16")).run_dir / "metrics.jsonl")
    tree["train"]["activations"] = {"checkpoint": "full", "media_chunk": 2}
    frugal = read_lines(train(build(tree, "frugal", steps=2)).run_dir / "metrics.jsonl")
    for a, b, c in zip(plain, rough, frugal, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)
        assert a["loss"] != b["loss"]
        assert a["loss"] == pytest.approx(c["loss"], rel=1e-6)


def test_other_data_at_the_same_place_cannot_resume_a_run_and_moved_data_can(
    tree: dict[str, Any], corpus: Path, tmp_path: Path, capfd
) -> None:
    train(build(tree, "moved", steps=2))
    shutil.copytree(corpus, tmp_path / "corpus")
    moved = json.loads(json.dumps(tree).replace(str(corpus), str(tmp_path / "corpus")))
    assert train(build(moved, "moved", steps=3)).step == 3
    assert "train.steps is 3, was 2: the learning rate follows the new length" in capfd.readouterr().err
    (tmp_path / "corpus" / "triples-000001.tar").unlink()
    with pytest.raises(
        CheckpointError, match=r"data\.sources\.triples: its shards have fingerprint \w+, in .*step 3 \w+"
    ):
        train(build(moved, "moved", steps=4))


def test_what_the_evaluation_needs_is_checked_before_training(tree: dict[str, Any]) -> None:
    tree["eval"]["suites"] = ["retrieval", "captions"]
    with pytest.raises(ConfigError, match=r"'captions'.*caption"):
        train(build(tree, "suites"))
    tree["eval"]["suites"] = ["retrieval"]
    tree["eval"]["sources"]["heldout"]["shards"] = "nowhere-*.tar"
    with pytest.raises(DataError, match="nowhere"):
        train(build(tree, "shards"))
    assert not (Path(tree["run"]["dir"]) / "shards").exists()


@pytest.mark.parametrize(("package", "extra"), [("tensorboard", "train"), ("wandb", "wandb"), ("jiwer", "eval")])
def test_missing_packages_are_named_before_anything_is_read(tree, monkeypatch, package: str, extra: str) -> None:
    tree["train"]["trackers"] = ["tensorboard", "wandb"]
    tree["data"]["sources"]["books"]["shards"] = "nowhere-*.tar"
    for module in (preflight, packages):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(ConfigError, match=rf"{package} is not installed: pip install 'mmctx\[{extra}\]'"):
        train(build(tree, "packages"))


def test_checkpoints_bring_their_encoder_weights(tree: dict[str, Any]) -> None:
    """Nothing is downloaded: tests run offline, and building a pretrained tower would fail."""
    run_dir = train(build(tree, "tower", steps=2)).run_dir
    path = run_dir / "checkpoint-2" / "config.json"
    description = json.loads(path.read_text())
    description["run"]["model"]["image"]["pretrained"] = tree["model"]["image"]["pretrained"] = True
    path.write_text(json.dumps(description))
    seal(path.parent)
    assert load_model(run_dir)[2].model.model_dump()["image"]["pretrained"] is True
    assert train(build(tree, "tower", steps=3)).step == 3


def test_ledgers_of_ranks_that_are_gone_are_set_back_too(tree: dict[str, Any]) -> None:
    run_dir = train(build(tree, "fewer", steps=2)).run_dir
    (run_dir / "skips-rank3.jsonl").write_text('{"step": 1}\n{"step": 9}\n')
    train(build(tree, "fewer", steps=3))
    assert read_lines(run_dir / "skips-rank3.jsonl") == [{"step": 1}]


def test_tensorboard_events_follow_metrics_over_a_restart(tree: dict[str, Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (4, 6):
        run_dir = train(build(tree, "events", steps=steps, save_every=2, trackers=["tensorboard"])).run_dir
        shutil.rmtree(run_dir / "checkpoint-4", ignore_errors=True)  # the first sitting is set back to step 2
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload().Scalars("loss")
    lines = read_lines(run_dir / "metrics.jsonl")
    assert [event.step for event in events] == [line["step"] for line in lines] == list(range(1, 7))
    assert [event.value for event in events] == pytest.approx([line["loss"] for line in lines])


def test_a_finished_run_is_left_as_it_is(tree: dict[str, Any]) -> None:
    config = build(tree, "again", steps=2)
    before = (train(config).run_dir / "latest" / "model.safetensors").stat().st_mtime_ns
    assert train(config).step == 2
    assert (Path(tree["run"]["dir"]) / "again" / "latest" / "model.safetensors").stat().st_mtime_ns == before


def test_another_config_cannot_resume_a_run(tree: dict[str, Any]) -> None:
    train(build(tree, "run", steps=2))
    tree["model"]["transformer"]["mlp_width"] = 64
    with pytest.raises(CheckpointError, match=r"mlp_width: 48 in the checkpoint, 64 asked for(.|\n)*run\.name"):
        train(build(tree, "run", steps=2))


def test_incomplete_and_damaged_checkpoints(tree: dict[str, Any], capfd) -> None:
    run_dir = train(build(tree, "damage", steps=4, save_every=2)).run_dir
    assert [p.name for p in list_checkpoints(run_dir)] == ["checkpoint-2", "checkpoint-4"]
    (run_dir / "checkpoint-4" / "COMPLETE").unlink()  # as after a kill: it does not count
    assert resolve_checkpoint(run_dir).name == "checkpoint-2"
    optimizer = run_dir / "checkpoint-2" / "trainer" / "optimizer" / "optimizer.safetensors"
    model = run_dir / "checkpoint-2" / "model.safetensors"
    for path in (optimizer, model):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for broken, what in ((whole[: len(whole) // 2], f"has {len(whole) // 2:,} bytes"), (flipped, "damaged")):
            path.write_bytes(broken)
            with pytest.raises(CheckpointError, match="none of its 1 checkpoints is whole"):
                train(build(tree, "damage", steps=4, save_every=2))
            said = capfd.readouterr().err
            assert f"{path}: {what}" in said
            assert f"or delete {run_dir / 'checkpoint-2'}" in said
        path.write_bytes(whole)
    assert train(build(tree, "damage", steps=4, save_every=2)).step == 4
    (run_dir / "checkpoint-4" / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="COMPLETE"):
        load_model(run_dir / "checkpoint-4")


def test_loader_workers_change_nothing(tree: dict[str, Any]) -> None:
    alone = train(build(tree, "alone", steps=3))
    tree["data"]["num_workers"] = 2
    assert_same(weights(alone.run_dir), weights(train(build(tree, "workers", steps=3)).run_dir))


@pytest.mark.timeout(600)
def test_a_signal_to_one_rank_stops_them_all(tree: dict[str, Any], tmp_path: Path) -> None:
    process = launch(tree, tmp_path, "ranks", *TWO_PROCESSES, steps=100_000, save_every=100_000, log_every=50)
    run_dir = Path(tree["run"]["dir"]) / "ranks"
    wait_for(run_dir / "metrics.jsonl", process)
    while not read_lines(run_dir / "metrics.jsonl"):
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [
        pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes().split(b"LOCAL_")[0]
    ]
    os.kill(int(second), signal.SIGTERM)
    output, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    (checkpoint,) = list_checkpoints(run_dir)
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 50 <= step < 100  # long before the next line is due
    assert read_lines(run_dir / "metrics.jsonl")[-1]["step"] == step
    assert output.count("run the same command to go on") == 1, (output, errors[-3000:])


@pytest.mark.timeout(600)
def test_two_processes_equal_one(tree: dict[str, Any], tmp_path: Path) -> None:
    """A real second process over gloo: the same global batches, the same losses and weights."""
    assert tree["model"]["transformer"]["dropout"] > 0
    sources = tree["data"]["sources"]
    sources["text"] = {"shards": sources["triples"]["shards"], "objectives": ["masked_lm"], "weight": 100}
    sources["triples"]["weight"] = sources["books"]["weight"] = 1
    tree["data"] |= {"bin_tokens": 200, "window_steps": 1}
    tree["objectives"]["masked_lm"]["context"] = "none"
    config = build(tree, "one", steps=4)
    data = build_data(config.data, config.data.sources, config.model, config.objectives, config.train.seed)
    seed = next(seed for seed in range(50) if one_rank_sees_nothing(Plan(config.data, data.tables, seed), data))
    tree["train"]["seed"] = seed
    config = build(tree, "one", steps=4)
    one = train(config)
    two = launch(tree, tmp_path, "two", *TWO_PROCESSES, steps=4)
    _, errors = two.communicate(timeout=300)
    assert two.returncode == 0, errors[-3000:]
    assert "destroy_process_group" not in errors
    run_dir = Path(tree["run"]["dir"]) / "two"
    for ours, theirs in zip(
        read_lines(one.run_dir / "metrics.jsonl"), read_lines(run_dir / "metrics.jsonl"), strict=True
    ):
        for key in ("loss", "loss/captioning", "loss/masked_lm", "loss/similarity", "grad_norm", "tokens"):
            if ours[key] is None:  # no prediction of this objective in the whole step
                assert theirs[key] is None, key
            else:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key
    a, b = weights(one.run_dir), weights(run_dir)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def one_rank_sees_nothing(plan: Plan, data: RunData) -> bool:
    """In some step one rank runs its encoders, and the other has nothing for them."""
    return any(len({"image" in data.dataset[bin].media for bin in plan.step(step)}) == 2 for step in range(4))


def test_undecodable_samples_are_skipped_and_written_down(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    config = build(damaged(tree, corpus, tmp_path / "corpus"), "skips", steps=4)
    run_dir = train(config.model_copy(update={"data": config.data.model_copy(update={"skip_budget": 0.5})})).run_dir
    skips = read_lines(run_dir / "skips.jsonl")
    assert {"step", "source", "shard", "key", "reason", "detail"} <= skips[0].keys()
    assert {(s["key"], s["reason"]) for s in skips} == {("triple0003", "undecodable_image")}
    assert read_lines(run_dir / "metrics.jsonl")[-1]["skipped"] == len(skips)


def test_too_many_skips_stop_the_run_and_name_the_shard(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    config = build(damaged(tree, corpus, tmp_path / "corpus"), "budget", steps=40)
    with pytest.raises(SkipBudgetError, match=r"skip_budget=0\.0 allows; most in .*triples-000000\.tar"):
        train(config.model_copy(update={"data": config.data.model_copy(update={"skip_budget": 0.0})}))


def test_a_single_process_notices_skips_before_it_logs(tree: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    tree = damaged(tree, corpus, tmp_path / "corpus")
    tree["data"]["skip_budget"] = 0.0
    with pytest.raises(SkipBudgetError):
        train(build(tree, "early", steps=40, log_every=1000, save_every=1000))
    assert not read_lines(Path(tree["run"]["dir"]) / "early" / "metrics.jsonl")


def test_many_samples_left_out_from_the_start_are_a_warning(tree: dict[str, Any], capfd) -> None:
    tree["data"] |= {"context_length": 16, "bin_tokens": 200}
    run_dir = train(build(tree, "short", steps=8)).run_dir  # more than an epoch
    skips = read_lines(run_dir / "skips.jsonl")
    assert {(skip["step"], skip["reason"], skip["planned"]) for skip in skips} <= {
        (n, "over_long", True) for n in range(1, 9)
    }
    books = len({skip["key"] for skip in skips if skip["source"] == "books"})
    warning = f"WARNING: data.sources.books: {books} of 12 samples are left out ({books} over_long)"
    assert warning in capfd.readouterr().err
    assert read_lines(run_dir / "metrics.jsonl")[-1]["left_out/over_long"] == len(skips)
