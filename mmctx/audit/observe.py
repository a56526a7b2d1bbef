"""Running the model on a batch and reading off what each document gets out of it.

Shapes: T tokens, D width, N documents, P embeddings of a view, E their size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmctx.audit.ownership import Ownership
from mmctx.model import MmctxModel
from mmctx.pack import PackedBatch


@dataclass(frozen=True, slots=True)
class Observation:
    """What the model makes of a batch.

    Attributes:
        hidden: (T, D) hidden states.
        pooled: of each `OBJECTIVE/VIEW`, (P, E) embeddings.
        losses: of each document that has labels, the sum of its own token losses.
    """

    hidden: Tensor
    pooled: Mapping[str, Tensor]
    losses: Mapping[int, float]

    def equals(self, other: Observation) -> bool:
        """Whether both are the same to the last bit."""
        pooled = all(torch.equal(embeddings, other.pooled[name]) for name, embeddings in self.pooled.items())
        return pooled and torch.equal(self.hidden, other.hidden) and self.losses == other.losses


class Subject:
    """A model and a batch that it is audited on.

    Args:
        model: in the mode that is audited.
        batch: on the model's device.
        owned: who owns what in it.
        seed: of dropout, the same in every run.
    """

    def __init__(self, model: MmctxModel, batch: PackedBatch, owned: Ownership, seed: int = 0) -> None:
        self.model, self.batch, self.owned, self.seed = model, batch, owned, seed
        self.device = batch.input_ids.device
        self.document_of = owned.document_of(self.device)
        self._label_positions = {  # of each document that has labels: its objective, and where they are
            d: {owned.objectives[d]: torch.tensor(positions, device=self.device)}
            for d, positions in enumerate(owned.labelled)
            if positions
        }

    def run(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Hidden states (T, D), and the embeddings (T, D) that went into the trunk, as nodes of one graph."""
        entered: list[Tensor] = []

        def catch(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            embeddings = arguments[0] if arguments[0].requires_grad else arguments[0].detach().requires_grad_()
            entered.append(embeddings)
            return (embeddings, *arguments[1:])

        handle = self.model.trunk.register_forward_pre_hook(catch)
        try:
            torch.manual_seed(self.seed)
            hidden = self.model.encode(batch)
        finally:
            handle.remove()
        return hidden, entered[0]

    def observe(self, batch: PackedBatch, hidden: Tensor | None = None) -> Observation:
        """Runs the model, or takes hidden states that are known already."""
        hidden = self.run(batch)[0].detach() if hidden is None else hidden
        with torch.no_grad():
            return Observation(hidden, self._embeddings(hidden, batch), self._losses(hidden, batch))

    def _embeddings(self, hidden: Tensor, batch: PackedBatch) -> dict[str, Tensor]:
        found = {}
        for name, positions in batch.pooled.items():
            embed = getattr(self.model.objectives[name.partition("/")[0]], "embed", None)
            if embed is not None:
                found[name] = embed(hidden, positions, batch.pool_sizes[name])
        return found

    def _losses(self, hidden: Tensor, batch: PackedBatch) -> dict[int, float]:
        """Each document's own loss: the objective is shown the labels of no other, but all else is still there for it to read."""
        documents, totals = [], []
        for document, positions in self._label_positions.items():
            alone = replace(batch, label_positions=positions, pooled={}, pool_sizes={}, pairs={})
            (name,) = positions
            totals.append(self._loss(name, hidden, alone))
            documents.append(document)
        return dict(zip(documents, torch.stack(totals).tolist(), strict=True)) if totals else {}

    def _loss(self, name: str, hidden: Tensor, batch: PackedBatch) -> Tensor:
        objective: Any = self.model.objectives[name]
        return objective(hidden, batch, self.model.output_head).total.float()

    def shared_losses(self, hidden: Tensor, batch: PackedBatch, documents: Collection[int]) -> dict[str, Tensor]:
        """Losses of objectives that compare documents with each other, over some of the documents only."""
        names = {name.partition("/")[0] for name in batch.pooled}
        some = self.restrict(batch, documents)
        names &= {name.partition("/")[0] for name in some.pooled}
        return {name: self._loss(name, hidden, replace(some, label_positions={})) for name in sorted(names)}

    def all_losses(self, hidden: Tensor, batch: PackedBatch, documents: Collection[int]) -> dict[str, Tensor]:
        """The loss of each objective over some of the documents only."""
        some = self.restrict(batch, documents)
        names = {*some.label_positions, *(name.partition("/")[0] for name in some.pooled)}
        return {name: self._loss(name, hidden, some) for name in sorted(names)}

    def restrict(self, batch: PackedBatch, documents: Collection[int]) -> PackedBatch:
        """The same tokens, but only these documents have labels and embeddings."""
        wanted = frozenset(documents)
        labels: dict[str, list[Tensor]] = {}
        for document, positions in self._label_positions.items():
            if document in wanted:
                for name, places in positions.items():
                    labels.setdefault(name, []).append(places)
        pooled, sizes, pairs = {}, {}, {}
        for name, owners in self.owned.pooled.items():
            kept = [row for row, document in enumerate(owners) if document in wanted]
            if kept:
                states = batch.pooled[name].split(batch.pool_sizes[name])
                pooled[name] = torch.cat([states[row] for row in kept])
                sizes[name] = tuple(batch.pool_sizes[name][row] for row in kept)
                pairs[name] = tuple(batch.pairs[name][row] for row in kept)
        joined = {name: torch.cat(parts) for name, parts in labels.items()}
        return replace(batch, label_positions=joined, pooled=pooled, pool_sizes=sizes, pairs=pairs)
