"""Suite `knowledge`, bounded by a reader that copies what was found and by one that does not look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from contexts import far_from_neutral
from tiny import png, words
from two_ranks import on_two_ranks

from mmctx.config import build_config
from mmctx.errors import ConfigError, DataError
from mmctx.eval import SUITES, evaluate
from mmctx.eval.suites import knowledge
from mmctx.eval.suites.knowledge import read_questions
from mmctx.train.config import RunConfig

pytest.importorskip("lancedb", reason="pip install 'mmctx[memory]'")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Twenty pictures and what they are; a picture finds itself, whatever the weights."""
    values = ["red", "green", "blue", "round", "tall"]
    rows: list[dict[str, Any]] = []
    for n in range(20):
        (tmp_path / f"{n}.png").write_bytes(png(n))
        answers = [values[n % 5], values[(n + 1 + n // 5 % 4) % 5]]
        rows.append({"id": f"q{n}", "question": "", "fact": "{}", "image": f"{n}.png", "answers": answers})
    rows += [
        {"id": f"other{n}", "question": words(n, 4), "answers": ["small", "big"], "asked": False} for n in range(5)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_reader_that_copies_follows_the_store(
    tree: dict[str, Any], questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree["eval"]["knowledge"] = {"questions": str(questions), "neighbours": 2}
    context = far_from_neutral(tree)
    blind = evaluate(context, ["knowledge"])["knowledge"]
    for state, cited in (("put", 1.0), ("changed", 1.0), ("removed", 0.0)):
        assert blind[state]["cited"] == cited
        assert blind[state]["low"] <= blind[state]["accuracy"] <= blind[state]["high"]
    assert blind["n"] == 20
    assert blind["chance"] == pytest.approx(1 / 7)
    assert blind["without"]["accuracy"] < 0.5

    def copy(self: Any, segments: list[tuple[str, Any]]) -> str:
        said = [value for kind, value in segments if kind == "text" and value.strip()]
        return said[-1].split()[-1] if said else "small"  # the nearest stands last

    monkeypatch.setattr(knowledge._Reader, "_choose", copy)
    found = evaluate(context, ["knowledge"])["knowledge"]
    assert (found["put"]["accuracy"], found["changed"]["accuracy"], found["changed"]["stale"]) == (1.0, 1.0, 0.0)
    assert found["removed"]["accuracy"] < 0.6  # what is found instead belongs to something else
    assert found["without"]["accuracy"] == 0
    assert SUITES["knowledge"].headline(found)["changed"] == 1.0


@pytest.mark.slow
def test_two_ranks_give_the_numbers_of_one(tree: dict[str, Any], questions: Path) -> None:
    tree["eval"]["knowledge"] = {"questions": str(questions), "neighbours": 2}
    context = far_from_neutral(tree)
    alone = evaluate(context, ["knowledge"])
    assert len({alone["knowledge"][state]["accuracy"] for state in ("put", "removed", "without")}) > 1
    assert on_two_ranks(context, lambda one: evaluate(one, ["knowledge"])) == [alone, alone]


def test_what_is_missing_is_named_before_training(tree: dict[str, Any], questions: Path, tmp_path: Path) -> None:
    config = build_config(RunConfig, tree, "tree")
    with pytest.raises(ConfigError, match=r"eval\.knowledge is not set"):
        SUITES["knowledge"].check(config.eval)
    tree["eval"]["knowledge"] = {"questions": str(tmp_path / "none.jsonl")}
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        SUITES["knowledge"].check(build_config(RunConfig, tree, "tree").eval)
    assert len(read_questions(questions)) == 25
    for row, message in [
        ({"id": "1", "question": "x", "answers": ["a", "a"]}, "answers must differ"),
        ({"id": "1", "question": "x", "answers": ["a"]}, "not enough values"),
        ({"id": "1", "question": "x", "answers": ["a", "b"], "fact": "x"}, r"fact must hold \{\}"),
        ({"id": "1", "question": "", "answers": ["a", "b"]}, "a question or an image"),
        ({"id": "1", "question": "x", "answers": ["a", "b"], "image": "no.png"}, "No such file"),
        ({"question": "x", "answers": ["a", "b"]}, "KeyError"),
    ]:
        questions.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=rf"line 1: no question.*{message}"):
            read_questions(questions)
    questions.write_text(json.dumps({"id": "1", "question": "x", "answers": ["a", "b"], "asked": False}) + "\n")
    with pytest.raises(DataError, match="asks nothing"):
        read_questions(questions)
