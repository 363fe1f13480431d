"""`tandem pull`: puts a model's files into the cache, with a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tandem.cli.common import JsonOption, print_json, stderr


def pull_with_bar(name: str) -> Path:
    """Fetches the model `name` unless it is there, with a bar on stderr. Returns its path. Raises ModelError."""
    from tandem import model_files

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(f"pulling {name}", total=None)

        def progress(done: int, total: int | None, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        return model_files.pull(name, progress=progress)


def pull(
    name: Annotated[str, typer.Argument(help="A known name, for example smollm2-135m.")],
    as_json: JsonOption = False,
) -> None:
    """Fetch a model into the cache and verify it; does nothing if it is already there."""
    path = pull_with_bar(name)
    if as_json:
        print_json({"name": name, "path": str(path), "bytes": path.stat().st_size})
    else:
        print(path)
