"""Section of the suite `knowledge`: does the answer follow the store, from state to state?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmctx.eval.report.pieces import Cell, Row, Section, Table
from mmctx.eval.report.sections.cells import interval, percent, share_cell

_STATES = {
    "put": "put in",
    "changed": "then changed",
    "removed": "then removed",
    "without": "without the store",
}
_COLUMNS = {"accuracy": "what the store holds", "stale": "what it held before", "cited": "own entry found"}


def knowledge_section(results: Mapping[str, Any]) -> Section | None:
    """A bar for each state of the store and each way to answer, with a tick where guessing stands."""
    states = [state for state in _STATES if state in results]
    if not states:
        return None
    chance, count = results["chance"], results["n"]
    rows = tuple(
        Row(_STATES[state], tuple(_cell(results[state], name, chance) for name in _COLUMNS)) for state in states
    )
    return Section(
        id="knowledge",
        title="Answers from a store",
        about=f"{count:,} questions about facts that were put into a store, changed and removed, after training. Each time the same is "
        "asked, with what the store finds in front. Answers are told apart among all values that any fact has: guessing is right in "
        f"{percent(chance)}. After the removal the answer that was held last counts: a model that follows its store falls to chance.",
        parts=(Table(name="states", corner="state of the store", columns=tuple(_COLUMNS.values()), rows=rows),),
    )


def _cell(found: Mapping[str, Any], name: str, chance: float) -> Cell | None:
    if name == "accuracy":
        return share_cell(found["accuracy"], chance, about=interval(found))
    return share_cell(found.get(name), None if name == "cited" else chance)
