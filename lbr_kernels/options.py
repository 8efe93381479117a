"""Parsers for command lines: this package's and those of the programs in ``python/``."""

from __future__ import annotations

from collections.abc import Callable, Collection

import typer


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A parser that takes these names, and refuses others naming them."""

    def parse(value: str) -> str:
        if value not in names:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(names)}")
        return value

    return parse
