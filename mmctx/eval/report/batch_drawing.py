"""A picture of one packed batch: which documents it holds, what their tokens are and where losses read.

Shapes: T tokens, N documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from mmctx.pack import MODALITIES, PackedBatch

KINDS = ("text", *MODALITIES)

# Middle tones: they must stand on white and on black, since the drawing also appears outside the report, in notebooks.
_KIND_COLORS = ("#98a2b3", "#4a8fe0", "#e8943a", "#d6c34a")
_OBJECTIVE_COLORS = ("#2f9e7a", "#a066c9", "#d9577b", "#a89a2c", "#38a3b8", "#8f6b57")

_ROW_TOKENS, _MAX_ROWS = 512, 24
# Heights in units of 1/512 of a row's width, so that a drawing looks the same however many tokens a row holds.
_BAND, _CELL, _TARGET, _GAP, _PITCH, _MARGIN, _FONT = 3.0, 10.0, 1.6, 0.7, 21.0, 24.0, 6.6


class _Piece(NamedTuple):
    """The part of a run of tokens that lies in one row."""

    row: int
    column: int
    length: int


def draw_batch(batch: PackedBatch, bin_tokens: int) -> str:
    """The flat sequence as rows of a strip, in SVG.

    Cells are coloured by modality, the band above them by objective; vertical lines separate documents, and a line below
    marks hidden states that a loss reads. Runs of equal tokens are one rectangle. Pointing at a document names its sample.

    Args:
        batch: on the host.
        bin_tokens: the bin's size: what the batch does not fill is drawn empty.
    """
    total = max(batch.num_tokens, bin_tokens)
    row_tokens = min(total, _ROW_TOKENS * max(1, -(-total // (_ROW_TOKENS * _MAX_ROWS))))
    canvas = _Canvas(row_tokens, _legend(batch))
    for piece in _pieces(batch.num_tokens, total - batch.num_tokens, row_tokens):
        canvas.rect(piece, "cell", "empty", "none")
    kinds, names = token_kinds(batch), _objective_names(batch)
    targets = _target_mask(batch)
    starts = [0, *accumulate(batch.layout.lengths)]
    for number, (start, end) in enumerate(pairwise(starts)):
        objective = batch.objectives[number]
        canvas.open_group(_describe(batch, number, kinds[start:end], start))
        for piece in _pieces(start, end - start, row_tokens):
            canvas.rect(piece, "band", "band", _color(_OBJECTIVE_COLORS, names.index(objective)))
        for kind, first, length in _runs(kinds[start:end]):
            for piece in _pieces(start + first, length, row_tokens):
                canvas.rect(piece, "cell", f"cell {KINDS[kind]}", _color(_KIND_COLORS, kind))
        for read, first, length in _runs(targets[start:end]):
            if read:
                for piece in _pieces(start + first, length, row_tokens):
                    canvas.rect(piece, "target", "target", "currentColor")
        canvas.close_group()
    for start in starts[1:-1]:
        canvas.boundary(start)
    return canvas.svg(f"One packed batch of {batch.num_tokens} tokens in {len(batch.objectives)} documents", total)


def count_batch(batch: PackedBatch, bin_tokens: int) -> dict[str, Any]:
    """The numbers beside the drawing: fill, tokens of each modality, documents, tokens and targets of each objective."""
    lengths, kinds, targets = batch.layout.lengths, token_kinds(batch), _target_mask(batch)
    starts = [0, *accumulate(lengths)]
    documents, tokens, read = Counter(batch.objectives), Counter(), Counter()
    for name, (start, end) in zip(batch.objectives, pairwise(starts), strict=True):
        tokens[name] += end - start
        read[name] += int(targets[start:end].sum())
    return {
        "tokens": batch.num_tokens,
        "documents": len(lengths),
        "causal": batch.layout.num_causal,
        "samples": batch.num_samples,
        "longest": batch.layout.max_seqlen,
        "fill": batch.num_tokens / bin_tokens,
        "modalities": [
            {"name": kind, "tokens": int((kinds == number).sum()), "color": _color(_KIND_COLORS, number)}
            for number, kind in enumerate(KINDS)
        ],
        "objectives": [
            {
                "name": name,
                "documents": documents[name],
                "tokens": tokens[name],
                "targets": read[name],
                "color": _color(_OBJECTIVE_COLORS, number),
            }
            for number, name in enumerate(_objective_names(batch))
        ],
    }


def token_kinds(batch: PackedBatch) -> np.ndarray:
    """(T,) int8, the index in `KINDS` of each token's modality."""
    kinds = np.zeros(batch.num_tokens, np.int8)
    for kind, media in batch.media.items():
        kinds[media.slots.cpu().numpy()] = KINDS.index(kind)
    return kinds


def _target_mask(batch: PackedBatch) -> np.ndarray:
    """(T,) bool: hidden states that a loss reads, to predict a token or to embed a document."""
    mask = torch.zeros(batch.num_tokens, dtype=torch.bool)
    for positions in (*batch.label_positions.values(), *batch.pooled.values()):
        mask[positions.cpu()] = True
    return mask.numpy()


def _objective_names(batch: PackedBatch) -> list[str]:
    return sorted(set(batch.objectives))


def _color(palette: Sequence[str], number: int) -> str:
    return palette[number % len(palette)]


def _legend(batch: PackedBatch) -> list[tuple[str, str]]:
    """(colour, label), objectives after modalities."""
    objectives = [(_color(_OBJECTIVE_COLORS, n), name) for n, name in enumerate(_objective_names(batch))]
    kinds = [(_color(_KIND_COLORS, n), kind) for n, kind in enumerate(KINDS) if kind == "text" or kind in batch.media]
    return [*kinds, *objectives, ("currentColor", "read by a loss")]


def _describe(batch: PackedBatch, number: int, kinds: np.ndarray, start: int) -> str:
    counts = ", ".join(f"{n} {KINDS[kind]}" for kind, n in sorted(Counter(kinds.tolist()).items()))
    direction = "causal" if number < batch.layout.num_causal else "both directions"
    key = batch.keys[number] if batch.keys else ""
    name = f"{key or '(no key)'} · {batch.objectives[number]} · {direction}"
    return f"{name}\n{len(kinds)} tokens ({counts}), positions {start} to {start + len(kinds) - 1}"


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(value, first position, length) of each stretch of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    for first, end in pairwise(edges):
        yield int(values[first]), first, end - first


def _pieces(start: int, length: int, row_tokens: int) -> Iterator[_Piece]:
    """Wraps a run of tokens into rows."""
    while length > 0:
        row, column = divmod(start, row_tokens)
        part = min(length, row_tokens - column)
        yield _Piece(row, column, part)
        start, length = start + part, length - part


class _Canvas:
    """Collects the shapes; one user unit across is one token."""

    def __init__(self, row_tokens: int, legend: Sequence[tuple[str, str]]) -> None:
        self.row_tokens, self.unit = row_tokens, row_tokens / _ROW_TOKENS
        self.left, self._parts = _MARGIN * self.unit, []
        self._top = self._draw_legend(legend)
        # (offset in the row, height) of each kind of mark, in units
        cell = _BAND + _GAP
        self._lanes = {"band": (0.0, _BAND), "cell": (cell, _CELL), "target": (cell + _CELL + _GAP, _TARGET)}

    def _draw_legend(self, legend: Sequence[tuple[str, str]]) -> float:
        """Draws swatches with labels, wrapped into lines, and returns the y where rows start."""
        unit, x, y = self.unit, self.left, 0.0
        for color, label in legend:
            width = (12 + 0.58 * _FONT * len(label) + 8) * unit  # about the width of the text: SVG cannot measure it
            if x > self.left and x + width > self.left + self.row_tokens:
                x, y = self.left, y + 10 * unit
            height = (_TARGET if color == "currentColor" else 6) * unit
            self._parts.append(
                f'<rect class="swatch" x="{x:g}" y="{y + 7 * unit - height:g}" width="{8 * unit:g}" height="{height:g}" '
                f'fill="{color}"/>'
            )
            self._text(x + 11 * unit, y + 6.4 * unit, label)
            x += width
        return y + 13 * unit

    def _text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{_FONT * self.unit:g}" text-anchor="{anchor}" fill="currentColor" '
            f'opacity="0.75">{escape(text)}</text>'
        )

    def rect(self, piece: _Piece, lane: str, name: str, color: str) -> None:
        """One run of tokens."""
        offset, height = self._lanes[lane]
        y = self._top + (piece.row * _PITCH + offset) * self.unit
        self._parts.append(
            f'<rect class="{escape(name)}" x="{self.left + piece.column:g}" y="{y:g}" width="{piece.length}" '
            f'height="{height * self.unit:g}" fill="{color}"/>'
        )

    def boundary(self, start: int) -> None:
        """The line in front of a document."""
        row, column = divmod(start, self.row_tokens)
        x, y = self.left + column, self._top + row * _PITCH * self.unit
        bottom = y + sum(self._lanes["cell"]) * self.unit
        self._parts.append(f'<line class="boundary" x1="{x:g}" x2="{x:g}" y1="{y:g}" y2="{bottom:g}"/>')

    def open_group(self, title: str) -> None:
        """Starts a document: its shapes share a title."""
        self._parts.append(f"<g><title>{escape(title)}</title>")

    def close_group(self) -> None:
        """Ends a document."""
        self._parts.append("</g>")

    def svg(self, title: str, total: int) -> str:
        """The finished drawing."""
        num_rows, unit = -(-total // self.row_tokens), self.unit
        for row in range(num_rows):
            y = self._top + (row * _PITCH + _BAND + _GAP + _CELL / 2 + 2.3) * unit
            self._text(self.left - 4 * unit, y, str(row * self.row_tokens), anchor="end")
        # half a stroke of room on the right
        size = f"0 0 {self.left + self.row_tokens + unit:g} {self._top + num_rows * _PITCH * unit:g}"
        style = (
            f".batch-drawing .boundary{{stroke:currentColor;stroke-width:{0.6 * unit:g}}}"
            f".batch-drawing .empty{{stroke:currentColor;stroke-opacity:.35;stroke-width:{0.5 * unit:g};"
            f"stroke-dasharray:{2 * unit:g}}}"
            ".batch-drawing g:hover rect{opacity:.7}"
        )
        return (
            f'<svg class="batch-drawing" xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" '
            f'aria-label="{escape(title)}" font-family="system-ui, sans-serif"><style>{style}</style>'
            + "".join(self._parts)
            + "</svg>"
        )
