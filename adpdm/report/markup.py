"""Builds HTML and SVG text; plain strings are always escaped, only `Html` passes through."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Union

VOID_TAGS = frozenset({"meta", "img", "br", "hr"})


class Html(str):
    """Text that is already markup."""

    __slots__ = ()


Child = Union[str, "Html", None]


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """Returns <name attributes>children</name>.

    `class_` and `for_` lose their underscore, other underscores become hyphens; None and False leave the
    attribute out, True makes it bare, floats get two digits.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
        parts.append(f" {label}" if value is True else f' {label}="{html.escape(_plain(value))}"')
    parts.append(">")
    if name in VOID_TAGS:
        return Html("".join(parts))
    return Html("".join([*parts, join(children), f"</{name}>"]))


def join(children: Iterable[Child]) -> Html:
    """Concatenates; everything that is not `Html` is escaped."""
    return Html(
        "".join(c if isinstance(c, Html) else html.escape(c, quote=False) for c in children if c is not None)
    )


def _plain(value: object) -> str:
    """Numbers as short as SVG allows."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return str(value)
