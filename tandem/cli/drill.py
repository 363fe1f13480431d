"""`tandem drill`: hurt real clusters on purpose, and see that the promises hold.

Owns the choice of drills, the printing and the exit code; what is done is in `tandem.drills`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tandem.cli.common import JsonOption, print_json, stderr, stdout
from tandem.errors import ConfigError


def drill(
    names: Annotated[list[str] | None, typer.Argument(help="Drills to play, by name.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    listing: Annotated[bool, typer.Option("--list", help="Say which there are, and play none.")] = False,
    repeat: Annotated[int, typer.Option(min=1, max=1000, help="How often each is played.")] = 1,
    picture: Annotated[Path | None, typer.Option(help="Write a page with a timeline of each drill.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Play drills: start real clusters, kill, freeze, cut and corrupt what a drill says, and check that tokens are those of a
    fault-free run, that every request ends once, and that nothing is left. Exit code 0 only if every check holds.

    Clusters are small and of their own; a running one is not touched.
    """
    from tandem.drills import report, spec
    from tandem.drills.run import Result, Runner, ordered

    if listing:
        for name in spec.names():
            print(f"{name}: {spec.load(name).spec.about}")
        return
    if bool(names) == everything:
        raise ConfigError("say which drills, or --all; --list shows them")
    drills = ordered([spec.load(name) for name in (spec.names() if everything else names or [])])
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="tandem-drills-") as folder, Runner(Path(folder), _say) as runner:
        for number, one in enumerate(drills):
            for _ in range(repeat):
                result = runner.play(one)
                results.append(result)
                if as_json:
                    for line in report.lines(result):
                        print_json(line)
                else:
                    _say(f"{'ok  ' if result.ok else 'FAIL'} {result.name} in {result.seconds:.1f} s")
                if not result.ok:
                    _say("\n".join(f"  {check.check}: {check.evidence}" for check in result.checks if not check.ok))
                    _say(result.logs)
            if number + 1 == len(drills) or drills[number + 1].spec.cluster != one.spec.cluster:
                runner.leave(one.spec.cluster)
    if picture is not None:
        picture.write_text(report.page(results, "Tandem drills"), encoding="utf-8")
    if not as_json:
        stdout.print(report.table(results))
    if not all(result.ok for result in results):
        raise typer.Exit(1)


def _say(line: str) -> None:
    stderr.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
