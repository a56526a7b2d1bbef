"""From values to one self-contained page: no network, no other file. Whatever comes from data is escaped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmctx.errors import DataError, MmctxError

_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "␡"}


def readable(text: str) -> str:
    """`text` as a page can show it: control characters as their pictures, bytes that were no UTF-8 as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8").translate(_CONTROL)


def render(
    template: str,
    *,
    folder: Path = Path(__file__).parent,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """A page from a template; every string is made readable and escaped.

    Args:
        template: its file's name.
        folder: where it lies, by default beside this file.
        filters: more than the usual ones.
        values: for the template.

    Raises:
        MmctxError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise MmctxError("the page needs jinja2: pip install 'mmctx[eval]'") from None
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,  # keys and texts come from data
        undefined=StrictUndefined,
        finalize=lambda value: readable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": _bytes, "embedded": _embedded, **(filters or {})}
    return environment.get_template(template).render(**values)


def write_page(path: Path, page: str) -> None:
    """Replaces a file as a whole: a reader never meets half of it.

    Raises:
        DataError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(page, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another file with --out") from None


def _embedded(value: Any) -> Any:
    """JSON for a script element: nothing in it can end the element."""
    from markupsafe import Markup

    return Markup(json.dumps(value).replace("<", "\\u003c"))


def _bytes(count: int) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
