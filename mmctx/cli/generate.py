"""`mmctx generate`: what a checkpoint writes behind text, pictures and sounds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mmctx.cli.common import Json, print_answer
from mmctx.errors import ConfigError

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
    as_json: Json = False,
) -> None:
    """Continue a prompt of text, pictures and sounds: mmctx generate runs/demo --image cat.png "This is"."""
    if stream and (as_json or beams > 1):
        raise ConfigError(
            f"--stream prints tokens as they come: it cannot be had with {'--json' if as_json else '--beams'}"
        )
    from mmctx.hf.answer import Part, write_answer

    parts = [_part(text, Part) for text in prompt or []]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": beams, "do_sample": False}
    if temperature or top_p is not None:
        options |= {
            "do_sample": True,
            "top_k": 0,
            "temperature": temperature or 1.0,
            "top_p": 1.0 if top_p is None else top_p,
        }
    answer = write_answer(checkpoint, parts, options, seed=seed, stream=stream)
    if not stream:
        print_answer(answer._asdict(), as_json, answer.text)


def _part(text: str, make: Any) -> Any:
    if not text.startswith(_MARK):
        return make("text", text)
    kind, _, value = text.removeprefix(_MARK).partition(":")
    return make(kind, value)
