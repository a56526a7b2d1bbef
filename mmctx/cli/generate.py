"""`mmctx generate`: what a checkpoint writes behind text, pictures and sounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mmctx.cli.common import Json, print_answer
from mmctx.errors import ConfigError, DataError

MemoryStore = Annotated[
    Path | None,
    typer.Option(metavar="STORE", help="A knowledge store: what it knows of the prompt is read first, and cited."),
]
Entries = Annotated[int, typer.Option("--entries", "-k", min=1, help="With --memory: entries at most.")]
Numbered = Annotated[bool, typer.Option("--numbered", help="With --memory: entries begin with [1], [2] and so on.")]
EncoderPlace = Annotated[
    str | None, typer.Option("--encoder", help="With --memory: where the store's encoder lies, if it has moved.")
]
_MEDIA = ("--image", "--audio")
_MARK = "\0"


class InOrder(TyperCommand):
    """Keeps the order in which texts and media were given: media options are read among the texts, as `_MARK kind:file`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """See the class."""
        marked, rest = [], iter(args)
        for argument in rest:
            if argument == "--":
                marked += [argument, *rest]
                break
            name, equals, value = argument.partition("=")
            found = (value if equals else next(rest, None)) if name in _MEDIA else None
            marked.append(argument if found is None else f"{_MARK}{name[2:]}:{found}")
        return super().parse_args(ctx, marked)


def generate(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="A checkpoint folder, a run folder for its newest one, or what save_pretrained wrote."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Texts; with --image and --audio, read in the order in which they are given."),
    ] = None,
    image: Annotated[list[str] | None, typer.Option(help="A picture, at this place of the prompt; any number.")] = None,
    audio: Annotated[list[str] | None, typer.Option(help="A sound, at this place of the prompt; any number.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 64,
    temperature: Annotated[
        float | None,
        typer.Option(min=0.0, help="Draw tokens, the likelier the lower; the likeliest is taken by default."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Draw among the likeliest tokens that share this probability."),
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Search so many answers side by side for the likeliest.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn; anew each time by default.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is written.")] = False,
    memory: MemoryStore = None,
    entries: Entries = 3,
    numbered: Numbered = False,
    encoder: EncoderPlace = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt of text, pictures and sounds: mmctx generate runs/demo --image cat.png "This is"."""
    if stream and (as_json or beams > 1):
        raise ConfigError(
            f"--stream prints tokens as they come: it cannot be had with {'--json' if as_json else '--beams'}"
        )
    from mmctx.hf.answer import Part, write_answer

    parts = [part for text in prompt or [] if (part := _part(text, Part)).value]
    citations = None
    if memory is not None and parts:
        parts, citations = _recalled(memory, parts, entries, numbered, encoder)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": False}
    if temperature or top_p is not None:
        options |= {
            "do_sample": True,
            "top_k": 0,
            "temperature": temperature or 1.0,
            "top_p": 1.0 if top_p is None else top_p,
        }
    answer = write_answer(checkpoint, parts, options, seed=seed, stream=stream)
    found = answer._asdict() if citations is None else answer._asdict() | {"citations": citations}
    shown = [*([] if stream else [answer.text]), *([] if citations is None else [_cited(citations)])]
    if shown:
        print_answer(found, as_json, "\n".join(shown))


def _part(text: str, make: Any) -> Any:
    if not text.startswith(_MARK):
        return make("text", text)
    kind, _, value = text.removeprefix(_MARK).partition(":")
    return make(kind, value)


def _recalled(
    store: Path, parts: Sequence[Any], count: int, numbered: bool, encoder: str | None
) -> tuple[list[Any], list[dict[str, Any]]]:
    """The prompt behind what a store knows of it, and the entries, most similar first."""
    from mmctx import api
    from mmctx.hf.answer import Part

    query: list[Any] = [(part.kind, part.value if part.kind == "text" else _bytes(part.value)) for part in parts]
    found = api.recall_from(store, query, count, encoder=encoder, numbered=numbered)
    return [Part(kind, value) for kind, value in found.segments], [citation.plain() for citation in found.citations]


def _cited(citations: Sequence[dict[str, Any]]) -> str:
    """A line an entry: number, id, similarity, what it shows, metadata."""
    lines = []
    for entry in citations:
        shown = " ".join(" ".join(entry["parts"]).split())[:80]
        about = [shown, *(" ".join(f"{name}: {value}".split()) for name, value in entry["facts"].items())]
        lines.append(f"[{entry['number']}] {entry['id']}  {entry['score']:.4f}  {'; '.join(about)}")
    return "\n".join(lines) or "no entry of the store was found"


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
