"""Attention with a memory against dense references that lay out every score, and in a model: generation, checkpointing, switching off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmctx.activations import ActivationsConfig
from mmctx.attention import memory_tiles as module
from mmctx.attention import search as search_module
from mmctx.attention.memory import Far, MemoryConfig, Past, memory_attention
from mmctx.attention.reference import attention_mask, reference_attention
from mmctx.attention.search import search, top
from mmctx.eval.attribution import Look, attention_rows
from mmctx.generate import continue_greedily, read_prompts
from mmctx.kv_cache import KVCache
from mmctx.layer_memory import LayerMemory, memory_off
from mmctx.layout import DocumentLayout
from mmctx.model import MmctxModel, ModelConfig
from mmctx.objectives import CaptioningConfig
from mmctx.pack import PackedBatch
from mmctx.rope import RopeConfig, Rotary, rotate
from mmctx.transformer import Transformer, TransformerConfig

EVERYTHING = 1 << 20


def leaves(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return list(torch.autograd.grad((out.double() * direction).sum(), inputs))


def dense(q: Tensor, k: Tensor, v: Tensor, far: Far, layout: DocumentLayout, window: int) -> Tensor:
    """All scores of all tokens in float64, the k best beyond the window picked by a full sort."""
    q, k, v, far_q, far_k = (x.double() for x in (q, k, v, far.q, far.k))
    group = q.shape[1] // k.shape[1]
    k, v, far_k = (x.repeat_interleave(group, dim=1) for x in (k, v, far_k))
    scale = q.shape[-1] ** -0.5
    near = torch.einsum("ihd,jhd->hij", q, k) * scale
    beyond = torch.einsum("ihd,jhd->hij", far_q, far_k) * scale
    causal = torch.arange(len(q)) < layout.num_causal_tokens
    distance = torch.arange(len(q))[:, None] - torch.arange(len(q))[None]
    reach = attention_mask(layout) & causal[:, None] & (distance >= window) & (distance < window + far.tokens)
    beyond = beyond.masked_fill(~reach, -torch.inf)
    rank = beyond.argsort(dim=-1, descending=True).argsort(dim=-1)
    beyond = beyond.masked_fill(rank >= far.top_k, -torch.inf) + far.gate.double()[:, None, None]
    scores = torch.where(attention_mask(layout, window), near, beyond)
    return torch.einsum("hij,jhd->ihd", scores.softmax(dim=-1), v)


@pytest.mark.parametrize("engine", ["torch", "faiss"])
@pytest.mark.parametrize(
    ("keys", "first", "window", "tokens", "count"),
    [(9000, 8700, 20, 7000, 8), (700, 400, 1, 700, 300), (300, 0, 30, 50, 16)],
)
def test_search_equals_brute_force(engine: str, keys: int, first: int, window: int, tokens: int, count: int) -> None:
    if engine == "faiss":
        pytest.importorskip("faiss")
    q, k = (x.detach() for x in leaves((2, 2, keys - first, 8), (2, keys, 8)))
    ids = search(q, k, first=first, window=window, tokens=tokens, top_k=count, engine=engine)
    distance = (first + torch.arange(q.shape[2]))[:, None] - torch.arange(keys)
    scores = torch.einsum("kgld,ksd->kgls", q, k)
    scores.masked_fill_((distance < window) | (distance >= window + tokens), -torch.inf)
    best, brute = scores.topk(ids.shape[-1], dim=-1)
    brute = brute.masked_fill(best == -torch.inf, -1)
    assert ids.shape[-1] == count
    assert torch.equal(ids.sort(dim=-1).values, brute.sort(dim=-1).values.int())


@pytest.mark.parametrize("size", [5, 31, 32, 500, 1023])
@pytest.mark.parametrize("count", [1, 3])
def test_best_of_blocks_are_the_best_of_all(size: int, count: int) -> None:
    scores = leaves((7, size))[0].detach()
    scores[0] = 1.0  # all alike
    scores[1, 3:] = -torch.inf
    values, places = top(scores, count)
    assert torch.equal(values.sort(dim=-1).values, scores.topk(count).values.sort(dim=-1).values)
    assert torch.equal(scores.gather(-1, places), values)
    assert all(len(set(row)) == count for row in places.tolist())


@pytest.mark.parametrize("window", [1, 20, 299])
def test_it_is_full_attention_where_k_covers_the_past(window: int) -> None:
    lengths = [300, 7, 50, 260, 40]
    layout = DocumentLayout.from_lengths(lengths, num_causal=4)
    q, k, v = inputs = leaves((657, 4, 16), (657, 2, 16), (657, 2, 16))
    out = memory_attention(q, k, v, layout, Far(q, k, torch.zeros(4), EVERYTHING, EVERYTHING), window=window)
    causal = layout.num_causal_tokens
    full, near = reference_attention(q, k, v, layout), reference_attention(q, k, v, layout, window)
    expected = torch.cat([full[:causal], near[causal:]])  # bidirectional documents see their window
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("top_k", "tokens", "window"), [(5, EVERYTHING, 7), (64, 100, 32), (1, 1, 1)])
def test_it_equals_a_dense_reference(top_k: int, tokens: int, window: int) -> None:
    layout = DocumentLayout.from_lengths([200, 30, 333, 20], num_causal=3)
    shapes = [(583, 4, 8), (583, 2, 8), (583, 2, 8), (583, 4, 8), (583, 2, 8), (4,)]
    *rest, gate = inputs = leaves(*shapes)
    q, k, v, far_q, far_k = rest
    far = Far(far_q, far_k, gate, top_k, tokens)
    out, expected = memory_attention(q, k, v, layout, far, window=window), dense(q, k, v, far, layout, window)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("top_k", "tokens"), [(5, EVERYTHING), (300, 60)])
def test_rows_of_attention_are_those_that_the_operator_mixes_by(top_k: int, tokens: int) -> None:
    """The suite `attribution` follows them: with one value for all heads, their mean mixes to the mean over heads."""
    q, k, v, far_q, far_k, gate = leaves((200, 4, 8), (200, 2, 8), (200, 1, 8), (200, 4, 8), (200, 2, 8), (4,))
    far = Far(far_q, far_k, gate, top_k, tokens)
    layout = DocumentLayout.from_lengths([200], 1)
    out = memory_attention(q, k, v.expand(-1, 2, -1), layout, far, window=10).mean(dim=1)
    rows = attention_rows(Look(q, k, far), 50, 200, 10)
    torch.testing.assert_close(rows @ v[:, 0], out[50:], atol=1e-6, rtol=1e-5)


def test_gradients_against_differences() -> None:
    layout = DocumentLayout.from_lengths([60], 1)
    inputs = leaves((60, 2, 4), (60, 1, 4), (60, 1, 4), (60, 2, 4), (60, 1, 4), (2,), dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, far_q: Tensor, far_k: Tensor, gate: Tensor) -> Tensor:
        return memory_attention(q, k, v, layout, Far(far_q, far_k, gate, 5, 30), window=7)

    assert torch.autograd.gradcheck(run, inputs)


def test_a_closed_gate_leaves_the_window() -> None:
    layout = DocumentLayout.from_lengths([200, 50], 2)
    q, k, v = (x.detach() for x in leaves((250, 2, 8), (250, 2, 8), (250, 2, 8)))
    out = memory_attention(q, k, v, layout, Far(q, k, torch.full((2,), -1e4), 8, EVERYTHING), window=10)
    torch.testing.assert_close(out.double(), reference_attention(q, k, v, layout, 10), atol=1e-6, rtol=1e-6)


def test_a_past_is_as_if_it_were_in_the_sequence() -> None:
    """And what it holds gets no gradient."""
    q, k, v = (x.detach() for x in leaves((300, 2, 8), (300, 1, 8), (300, 1, 8)))
    gate = torch.zeros(2)
    whole = memory_attention(q, k, v, DocumentLayout.from_lengths([300], 1), Far(q, k, gate, 9, 120), window=16)
    for cut, kept in ((200, 200), (200, 135), (100, 100)):  # the window and 120 more are what can be found
        layout = DocumentLayout.from_lengths([300 - cut, 50], 2)
        tail = [torch.cat([x[cut:], x[:50]]) for x in (q, k, v)]
        past = Past(*(x[cut - kept : cut] for x in (k, v, k)))
        far = Far(tail[0], tail[1], gate, 9, 120)
        out = memory_attention(*tail, layout, far, window=16, past=past)
        torch.testing.assert_close(out[: 300 - cut], whole[cut:], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(out[300 - cut :], whole[:50], atol=1e-6, rtol=1e-6)  # the next document has none


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_no_tensor_grows_with_the_square() -> None:
    found = []
    for length in (2048, 8192):
        q, k, v = (x.detach() for x in leaves((1, 1, length, 4), (1, length, 4), (1, length, 4)))
        with Largest() as largest:
            out, lse, ids = module.attend_tiles(q, q, k, v, k, torch.zeros(1, 1), 64, 8, EVERYTHING, "torch")
            module.attend_tiles_backward(out, q, q, k, v, k, torch.zeros(1, 1), out, lse, ids, 64)
        found.append(largest.numel)
    assert found[1] <= 4 * found[0]
    assert found[1] <= search_module.QUERIES * search_module.KEYS


def trunk(memory: MemoryConfig | None, windows: tuple[int | None, ...] = (16,), **changes: Any) -> Transformer:
    torch.manual_seed(0)
    shape = {"width": 32, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_width": 32} | changes
    return Transformer(TransformerConfig(windows=windows, memory=memory, **shape))


def documents(lengths: tuple[int, ...], causal: int, width: int = 32) -> tuple[Tensor, Tensor, DocumentLayout]:
    x = torch.randn(sum(lengths), width, generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])
    return x, positions, DocumentLayout.from_lengths(lengths, causal)


def test_a_model_with_exact_distances_is_one_without_windows() -> None:
    x, positions, layout = documents((150, 40, 90), 3)
    memory = MemoryConfig(layers=(0, 1), top_k=EVERYTHING, distances="exact")
    remembering, full = trunk(memory), trunk(None, (None,))
    full.load_state_dict({n: p for n, p in remembering.state_dict().items() if "memory" not in n})
    mine, theirs = (model(x, positions, layout) for model in (remembering, full))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    for name, parameter in full.named_parameters():
        torch.testing.assert_close(remembering.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-5)
    gates = [block.attention.memory.gate.grad for block in remembering.blocks]  # type: ignore[union-attr]
    assert all(gate is not None and gate.abs().min() > 0 for gate in gates)
    off = trunk(None)
    off.load_state_dict(full.state_dict())
    with memory_off(remembering):
        assert torch.equal(remembering(x, positions, layout), off(x, positions, layout))


@pytest.mark.parametrize("scaling", ["none", "yarn"])
def test_clamped_keys_stand_right_behind_the_window(scaling: Any) -> None:
    options = {} if scaling == "none" else {"factor": 4, "original_context": 64}
    rope = RopeConfig(scaling=scaling, **options)
    layer = LayerMemory(MemoryConfig(layers=(0,)), rope, 2, 8)
    q, k = (x.detach() for x in leaves((50, 2, 8), (50, 2, 8)))
    far = layer.far(q, k, q, k, window=16)
    assert far is not None
    rotary = Rotary(rope, 8)
    for place in (0, 7, 100_000):  # wherever both stand, 16 apart
        there, here = (rotate(x, *rotary(torch.full((50,), p), x.dtype)) for x, p in ((q, place + 16), (k, place)))
        torch.testing.assert_close(
            (far.q * far.k).sum(-1), (there * here).sum(-1), atol=1e-2 if place > 7 else 1e-5, rtol=1e-3
        )


@pytest.mark.parametrize("checkpoint", ["full", "selective"])
def test_checkpointing_changes_nothing_and_selective_searches_once(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, positions, layout = documents((150, 40, 90), 3)
    plain, kept = (trunk(MemoryConfig(layers=(0, 1), top_k=4)).train() for _ in range(2))
    kept.set_activations(ActivationsConfig(checkpoint=checkpoint, mlp_tile=64))
    plain(x, positions, layout).square().sum().backward()
    calls = []

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return search(*args, **options)

    monkeypatch.setattr(module, "search", counted)
    kept(x, positions, layout).square().sum().backward()
    assert len(calls) == {"full": 12, "selective": 6}[checkpoint]  # 3 documents, 2 layers
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(kept.get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-5)


def test_compiled_blocks_give_the_same() -> None:
    x, positions, layout = documents((60, 40), 2)
    plain, compiled = (trunk(MemoryConfig(layers=(1,), top_k=4)) for _ in range(2))
    compiled.set_compiler("aot_eager")
    torch.testing.assert_close(compiled(x, positions, layout), plain(x, positions, layout), atol=1e-5, rtol=1e-5)


def model(memory: MemoryConfig) -> MmctxModel:
    torch.manual_seed(0)
    shape = TransformerConfig(width=32, depth=2, num_heads=4, num_kv_heads=2, mlp_width=32, windows=(8,), memory=memory)
    return MmctxModel(ModelConfig(transformer=shape), {"text": CaptioningConfig()}, 64).eval()


def batch(lengths: tuple[int, ...]) -> PackedBatch:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(64, (sum(lengths),), generator=generator)
    return PackedBatch(
        input_ids=ids,
        labels=torch.full_like(ids, -100),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        layout=DocumentLayout.from_lengths(lengths, len(lengths)),
        objectives=("text",) * len(lengths),
    )


@pytest.mark.parametrize("distances", ["clamped", "exact"])
def test_generation_remembers_as_reading_does(distances: Any) -> None:
    """Token by token from a cache, far beyond the window, as if the whole had been read at once; and so do branches."""
    remembering = model(MemoryConfig(layers=(1,), top_k=3, tokens=40, distances=distances))
    with torch.no_grad():
        for parameter in remembering.parameters():  # weights of a model that has learnt something
            if parameter.ndim == 2:
                parameter.mul_(6)
        whole = batch((70, 33))
        expected = remembering.encode(whole)
        cache = KVCache(30)
        prompts = batch((70, 33))
        cut = [torch.arange(40), 70 + torch.arange(20)]
        ids = torch.cat([whole.input_ids[part] for part in cut])
        layout = DocumentLayout.from_lengths((40, 20), 2)
        prompts = PackedBatch(
            input_ids=ids, labels=ids, position_ids=torch.cat([torch.arange(40), torch.arange(20)]), layout=layout, objectives=("text",) * 2
        )  # fmt: skip
        states = [remembering.prefill(prompts, cache)]
        tails = [whole.input_ids[40:70], whole.input_ids[90:103]]
        branches = remembering.branch(tails[:1] * 2, cache, 0)
        torch.testing.assert_close(branches, torch.cat([expected[40:70]] * 2), atol=2e-5, rtol=1e-4)
        states += [remembering.step(torch.stack([tail[n] for tail in tails]), cache) for n in range(13)]
    for n, state in enumerate(states):
        torch.testing.assert_close(state, torch.stack([expected[39 + n], expected[89 + n]]), atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, _without_memory(remembering, whole), atol=1e-2)


def _without_memory(remembering: MmctxModel, whole: PackedBatch) -> Tensor:
    with torch.no_grad(), memory_off(remembering):
        return remembering.encode(whole)


def test_generation_goes_beyond_all_that_was_read() -> None:
    """Two ways to go on greedily: from the cache, and by reading everything again."""
    remembering, prompts = model(MemoryConfig(layers=(0, 1), top_k=4)), batch((30,))
    hidden, cache = read_prompts(remembering, prompts, 40)
    (found,) = continue_greedily(remembering, hidden, cache, eos_id=-1, max_new_tokens=40)
    ids = prompts.input_ids.tolist()
    for token in found:
        again = batch((len(ids),))
        again.input_ids.copy_(torch.tensor(ids))
        with torch.no_grad():
            assert int(remembering.next_token_logits(remembering.encode(again)[-1:]).argmax()) == token
        ids.append(token)


@pytest.mark.parametrize(
    ("memory", "windows", "message"),
    [
        ({"layers": (2,)}, (8,), "there are 2"),
        ({"layers": (1,)}, (8, None), "a memory begins where a window ends"),
        ({"layers": (1, 1)}, (8,), "once"),
    ],
)
def test_layers_that_cannot_have_a_memory(memory: Any, windows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(depth=2, windows=windows, memory=memory)
