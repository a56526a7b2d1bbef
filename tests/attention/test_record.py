"""`attention: auto` goes by the machine's certificate: the fastest that passed, never one that failed, the same on every rank."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from mmctx.attention import BACKENDS, Backend, Request, attention, select_backend
from mmctx.attention.choice import Choice, certified_choice, using
from mmctx.attention.record import (
    CrossoverEntry,
    Entry,
    Record,
    describe_machine,
    load_record,
    record_path,
    save_record,
)
from mmctx.attention.resolve import resolve
from mmctx.attention.sdpa import sdpa_attention
from mmctx.errors import BackendError, ConfigError
from mmctx.layout import DocumentLayout

CPU = torch.device("cpu")
PLAIN = Request(CPU, torch.float32, 16)
LOCAL = Request(CPU, torch.float32, 16, windowed=True)


@pytest.fixture(autouse=True)
def rivals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Two more backends that can run here, in a machine with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("swift", "wrong"):
        monkeypatch.setitem(BACKENDS, name, Backend(name, sdpa_attention, why_not_here, ""))
    _forget()
    yield
    _forget()


def why_not_here(request: Request) -> str | None:
    return "it gives other bits each time" if request.deterministic else None


def _forget() -> None:
    from mmctx import attention as module

    certified_choice.cache_clear()
    module._select.cache_clear()


def entry(backend: str, ms: float, window: float | None = None, passed: bool = True, same_bits: bool = True) -> Entry:
    times = {"short": ms, "long": ms, "window": ms if window is None else window} if passed else {}
    return Entry(backend=backend, dtype="float32", passed=passed, same_bits=same_bits, milliseconds=times)


def certificate(*entries: Entry, **changes: str) -> Record:
    return Record(machine=describe_machine(CPU) | changes, made="2026-01-02T03:04:05Z", entries=list(entries))


def choice_of(request: Request = PLAIN) -> str:
    _forget()
    return select_backend("auto", request).name


# ---- what auto takes


def test_without_a_certificate_the_static_order_holds():
    assert choice_of() == "sdpa"


def test_the_faster_one_that_passed_is_taken():
    save_record(certificate(entry("sdpa", 2.0), entry("swift", 1.0)), CPU)
    assert choice_of() == "swift"
    save_record(certificate(entry("sdpa", 1.0), entry("swift", 2.0)), CPU)
    assert choice_of() == "sdpa"


def test_one_that_failed_is_never_taken():
    save_record(certificate(entry("sdpa", 2.0), entry("wrong", 1.0, passed=False)), CPU)
    assert choice_of() == "sdpa"
    save_record(certificate(*(entry(name, 1.0, passed=False) for name in BACKENDS)), CPU)
    with pytest.raises(BackendError, match=r"sdpa: it failed certification .*2026-01-02"):
        choice_of()
    layout = DocumentLayout.from_lengths((4,), 1)
    q = torch.randn(4, 1, 16)
    with pytest.raises(BackendError, match="failed certification"):
        attention(q, q, q, layout)


def test_failing_in_one_type_is_failing_in_all():
    failed = Entry(backend="swift", dtype="bfloat16", passed=False, same_bits=None, milliseconds={})
    save_record(certificate(entry("sdpa", 2.0), entry("swift", 1.0), failed), CPU)
    assert choice_of() == "sdpa"


def test_layers_under_a_window_go_by_their_own_time():
    save_record(certificate(entry("sdpa", 2.0, window=1.0), entry("swift", 1.0, window=3.0)), CPU)
    assert choice_of(PLAIN) == "swift"
    assert choice_of(LOCAL) == "sdpa"


def test_deterministic_mode_takes_what_is():
    save_record(certificate(entry("sdpa", 2.0), entry("swift", 1.0)), CPU)
    assert choice_of(Request(CPU, torch.float32, 16, deterministic=True)) == "sdpa"
    save_record(certificate(entry("sdpa", 2.0, same_bits=False)), CPU)
    with pytest.raises(BackendError, match="sdpa: its backward pass gave different bits"):
        choice_of(Request(CPU, torch.float32, 16, deterministic=True))


# ---- the file


def test_it_is_read_once():
    path = save_record(certificate(entry("sdpa", 2.0), entry("swift", 1.0)), CPU)
    assert choice_of() == "swift"
    path.unlink()
    assert select_backend("auto", LOCAL).name == "swift"


def test_crossover_survives_the_file():
    crossover = CrossoverEntry(short="torch_varlen", causal=4096, bidirectional=None)
    save_record(certificate(entry("sdpa", 1.0)).model_copy(update={"crossover": crossover}), CPU)
    record = load_record(CPU)
    assert record is not None
    found = record.choice().crossover
    assert found is not None
    assert (found.short, found.causal, found.bidirectional) == ("torch_varlen", 4096, None)
    assert found.is_long(4096, causal=True)
    assert not found.is_long(4095, causal=True)
    assert not found.is_long(10**6, causal=False)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"machine": 3}', "\x00\xff", '{"entries": [{"backend": 1}]}']
)
def test_a_damaged_one_is_ignored_with_one_warning(content: str):
    path = record_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    _forget()
    with pytest.warns(UserWarning, match="ignored, not a certificate") as caught:
        assert [select_backend("auto", request).name for request in (PLAIN, LOCAL)] == ["sdpa", "sdpa"]
    assert len(caught) == 1
    assert str(path) in str(caught[0].message)


@pytest.mark.parametrize("changed", ["torch", "device", "flash-attn-4", "code"])
def test_one_of_another_machine_or_version_is_ignored(changed: str):
    save_record(certificate(entry("swift", 1.0), **{changed: "0.0.1"}), CPU)
    with pytest.warns(UserWarning, match=rf"{changed} 0\.0\.1, here is .*mmctx doctor"):
        assert choice_of() == "sdpa"


def test_a_fresh_one_is_no_reason_to_warn():
    save_record(certificate(entry("swift", 1.0)), CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choice_of() == "swift"


# ---- one choice for all ranks


def in_two_ranks(name: str, other: object, requests=None):
    """`resolve` on the first of two ranks; the other one answers `other` to what it is asked last."""
    answers = []

    def gather(own):
        answers.append(own)
        return [own, None] if len(answers) == 1 else [own, other]

    return resolve(name, requests or {"global": PLAIN}, gather, is_first=True)


def test_the_first_ranks_certificate_holds():
    chosen = pickle.loads(pickle.dumps(certificate(entry("sdpa", 2.0), entry("swift", 1.0)).choice()))  # as it travels

    def gather(own):
        return [chosen, own] if own is None or isinstance(own, Choice) else [own, own]

    found = resolve("auto", {"global": PLAIN}, gather, is_first=False)  # this rank has no certificate
    assert found.backends == {"global": "swift"}
    with using(found.choice):
        assert select_backend("auto", PLAIN).name == "swift"
    assert select_backend("auto", PLAIN).name == "sdpa"


def test_only_what_all_ranks_can_use_is_taken():
    save_record(certificate(entry("sdpa", 2.0), entry("swift", 1.0)), CPU)
    found = in_two_ranks("auto", {"global": (["sdpa"], {"swift": "not installed"})})
    assert found.backends == {"global": "sdpa"}
    with using(found.choice):
        assert select_backend("auto", PLAIN).name == "sdpa"
    with pytest.raises(ConfigError, match="rank 1: sdpa: broken"):
        in_two_ranks("auto", {"global": ([], {"sdpa": "broken"})})


def test_a_named_backend_must_run_on_every_rank():
    assert in_two_ranks("swift", None).backends == {"global": "swift"}
    with pytest.raises(ConfigError, match=r"attention=swift: it cannot be used on rank 1: not installed"):
        in_two_ranks("swift", "not installed")
    with pytest.raises(ConfigError, match="unknown attention backend 'swfit'"):
        resolve("swfit", {"global": PLAIN})


def test_a_named_backend_that_is_not_deterministic_is_an_error():
    request = Request(CPU, torch.float32, 16, deterministic=True)
    with pytest.raises(ConfigError, match=r"train\.deterministic is true, but .*other bits.*attention=auto"):
        resolve("swift", {"global": request})
    assert resolve("auto", {"global": request}).backends == {"global": "sdpa"}


def test_what_was_chosen_can_be_written_down():
    save_record(certificate(entry("swift", 1.0), entry("wrong", 1.0, passed=False)), CPU)
    found = resolve("auto", {"global": PLAIN, "local": LOCAL})
    tree = json.loads(json.dumps(found.to_json()))
    assert tree["backends"] == {"global": "swift", "local": "swift"}
    assert tree["failed"] == ["wrong"]
    assert "2026-01-02" in tree["by"]
    assert found.describe(deterministic=True).startswith("attention: swift, deterministic, by the certificate of 2026")
    assert "WARNING: wrong failed" in resolve("wrong", {"global": PLAIN}).describe(deterministic=False)
