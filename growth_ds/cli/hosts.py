"""Verbs about machines: where ranks run, what they said, what is installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from growth_ds.cli.common import Json, app


@app.command(
    epilog="Example: growth-ds launch --hostfile hosts -- train configs/run/demo.yaml",
    context_settings={"allow_interspersed_args": False},
)
def launch(
    argv: Annotated[
        list[str], typer.Argument(metavar="-- train CONFIG ...", help="The growth-ds command that every rank runs.")
    ],
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks on this machine; with --slurm or --mpi ranks in all.")
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(help="Lines `n1 slots=2`: hosts that ssh reaches. Default: --ranks, --slurm or --mpi says where."),
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Start ranks with srun, inside a job.")] = False,
    mpi: Annotated[bool, typer.Option("--mpi", help="Start ranks with Open MPI's mpirun.")] = False,
    interface: Annotated[
        str | None, typer.Option(help="Network between the hosts: eth0. Default: the way to the first host.")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="First host, as the others reach it. Default: found here.")
    ] = None,
    master_port: Annotated[
        int | None, typer.Option(help="A free port there, 1 to 65535. Default: one that is found free.")
    ] = None,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, or NAME as here. May be repeated.")] = None,
    ssh: Annotated[str | None, typer.Option(help="Instead of ssh: a command that takes HOST and a line.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands, start nothing.")] = False,
) -> None:
    """Start a run on this machine, on several by ssh, in a Slurm job or under MPI; nothing outlives it on any host."""
    from growth_ds.launching import Launch, prepare

    asked = Launch(argv, ranks, hostfile, slurm, mpi, interface, master_addr, master_port, ssh, tuple(env or ()))
    prepared = prepare(asked)
    if dry_run:
        typer.echo("\n".join(prepared.lines()))
    else:
        raise typer.Exit(prepared.run())


@app.command(epilog="Example: growth-ds logs runs/demo --rank 1 --rank 3")
def logs(
    run: Annotated[Path, typer.Argument(help="The run folder, which holds logs/.")],
    rank: Annotated[list[int] | None, typer.Option(help="This rank alone. May be repeated. Default: all.")] = None,
) -> None:
    """Show what the ranks of a run have printed on all hosts, as one text in order of time."""
    from growth_ds.rank_logs import merged

    for line in merged(run, rank):
        typer.echo(line)


@app.command(epilog="Example: growth-ds doctor --json")
def doctor(
    hosts: Annotated[Path | None, typer.Option(help="A hostfile: check those hosts instead, by ssh.")] = None,
    ssh: Annotated[str | None, typer.Option(help="For --hosts, instead of ssh: takes HOST and a line.")] = None,
    explain: Annotated[str | None, typer.Option(help="Instead: what an error's code means, such as GDS-C02.")] = None,
    as_json: Json = False,
) -> None:
    """Show versions and devices, and which implementation every fused op takes here and why.

    With --hosts: does ssh reach each, are versions, folder and clock alike, how fast is the network? 1 if not.
    """
    if explain is not None:
        from growth_ds import catalogue

        return typer.echo(catalogue.explain(explain))
    if hosts is not None:
        from growth_ds import host_check
        from growth_ds.launching import SSH_ENV

        words = ssh or os.environ.get(SSH_ENV) or "ssh"
        found = host_check.check_hosts(hosts, words, Path.cwd(), os.environ.get("PYTHONPATH"))
        report = json.dumps(host_check.records(found), indent=1) if as_json else "\n".join(host_check.lines(found))
        typer.echo(report)
        raise typer.Exit(0 if all(finding.well for finding in found) else 1)
    from growth_ds import doctor as examination

    record = examination.examine()
    typer.echo(json.dumps(record, indent=1) if as_json else "\n".join(examination.lines(record)))
