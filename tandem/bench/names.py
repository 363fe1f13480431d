"""What a command line names of what there is to measure.

Owns the one check and its words.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeVar

from tandem.errors import ConfigError

_Name = TypeVar("_Name", bound=str)


def named(names: Sequence[str], known: Collection[_Name], what: str, *, optional: bool = False) -> list[_Name]:
    """Those of `known` that are named, each once, in the order of `names`. Raises ConfigError for a name that is no `what`, and
    for none at all, unless that is `optional`."""
    there_are = f"({', '.join(known)} are)"
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is no {what} {there_are}")
    if not names and not optional:
        raise ConfigError(f"no {what} is named {there_are}")
    by_name = {str(one): one for one in known}
    return [by_name[name] for name in dict.fromkeys(names)]
