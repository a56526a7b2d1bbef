"""Packages of extras, which training does without."""

from __future__ import annotations

from importlib.util import find_spec

from mmctx.errors import ConfigError


def require(*names: str, extra: str = "eval") -> None:
    """Raises ConfigError, with the remedy, if one of the packages is not installed."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)} is not installed: pip install 'mmctx[{extra}]'")
