"""Verbs that make, plan, train and compare runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from growth_ds.cli.common import Config, Force, Json, Ranks, Sets, app
from growth_ds.errors import UserError

if TYPE_CHECKING:
    from growth_ds.config import Run


@app.command(epilog="Example: growth-ds prepare corpus/*.jsonl.gz --out data/wiki --vocab-size 16000")
def prepare(
    inputs: Annotated[
        list[str],
        typer.Argument(help=".txt, .jsonl (field text), also .gz, .zst; folders; globs; hf:NAME[:CONFIG[:SPLIT]]."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the store that is written.")],
    tokenizer: Annotated[
        str, typer.Option(help="sentencepiece, a vocab.txt, or a tokenizer folder (BERT, RoBERTa).")
    ] = "sentencepiece",
    vocab_size: Annotated[
        int, typer.Option(min=16, help="Pieces of a sentencepiece tokenizer that is trained.")
    ] = 8192,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that tokenize. Default: all cores.")] = None,
    valid: Annotated[float, typer.Option(help="Share of the documents kept for validation, from 0 to below 1.")] = 0.02,
    errors: Annotated[str, typer.Option(help="Text that is not UTF-8: 'strict' stops, 'replace' goes on.")] = "strict",
    force: Force = False,
) -> None:
    """Turn text into a store: tokens on disk, memory-mapped, with their tokenizer."""
    from growth_ds.data import hub
    from growth_ds.data.prepare import prepare as build

    if errors not in ("strict", "replace"):
        raise UserError(f"--errors: '{errors}' is neither strict nor replace")
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "workers": workers}
    with hub.local(inputs, out) as files:
        store = build(files, out, **options, valid=valid, errors=errors, force=force)
    for name in ("train", "valid"):
        split = store.split(name)
        typer.echo(f"{out}: {name} {split.tokens:,} tokens in {split.documents:,} documents")


@app.command(epilog="Example: growth-ds plan configs/run/bert-large-stack.yaml --ranks 8")
def plan(
    config: Config,
    ranks: Ranks = 1,
    fit: Annotated[bool, typer.Option("--fit", help="Also try micro-batches here, by training steps.")] = False,
    hardware: Annotated[
        str | None, typer.Option(help="Forecast on such GPUs: v100, a100, h100, ...; or here. Default: no forecast.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="For --hardware: number of machines. Default: 1.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="For --hardware: GPUs of each machine. Default: 8.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="For --hardware: all GPUs, in machines of 8.")] = None,
    interconnect: Annotated[
        str | None,
        typer.Option(help="Bits a second of each GPU's link (400g), or a node's (8x100g). Default: as its maker's."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0.0, help="For --hardware: price of a GPU and hour, in any currency.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the plan as a self-contained HTML page, too. Default: on the terminal alone."),
    ] = None,
    force: Force = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="For --hardware here: keep what was measured in this file, and use it."),
    ] = None,
    as_json: Json = False,
    sets: Sets = None,
) -> None:
    """Show what a run costs and what each growth does. Needs no data; without --fit and here, allocates nothing."""
    from growth_ds.config_file import load_run
    from growth_ds.optim.curve import curve
    from growth_ds.planning import plan_run
    from growth_ds.reckoning import Hardware, reckoned
    from growth_ds.reporting import check_page

    if out is not None:
        check_page(out, force)
    run = load_run(config, sets or ())
    asked = Hardware(hardware, nodes, gpus_per_node, gpus, interconnect, price, calibration)
    ranks = asked.ranks(ranks)
    record = plan_run(run, ranks)
    if found := reckoned(run, asked, ranks, say=lambda line: typer.echo(line, err=True)):
        record["forecast"] = found
    record["lr"] = curve(run)
    if not as_json:
        _show_plan(record)
    if out is not None:
        from growth_ds.report.plan_page import write_plan

        typer.echo(write_plan(record, out), err=as_json)
    if fit:
        record["fit"] = _fitted(run, ranks, as_json)
    if as_json:
        typer.echo(json.dumps(record, indent=1))


def _fitted(run: Run, ranks: int, as_json: bool) -> Any:
    """What `--fit` finds by training steps, printed unless JSON is asked for."""
    from growth_ds.fit import fit_run, print_fit

    found = fit_run(run, ranks, say=lambda line: typer.echo(line, err=True))
    if not as_json:
        print_fit(found)
    return found


def _show_plan(record: dict[str, Any]) -> None:
    """The plan's tables, its learning rate as a drawing, and the forecast if there is one."""
    from growth_ds.forecast import print_forecast
    from growth_ds.optim.curve import BLOCKS, drawing
    from growth_ds.planning import print_plan
    from growth_ds.terminal import console

    print_plan(record)
    is_utf = (sys.stdout.encoding or "").lower().startswith("utf")
    typer.echo("\n".join(drawing(record["lr"], BLOCKS if is_utf else "#", console().width)))
    if "forecast" in record:
        print_forecast(record["forecast"])


@app.command(epilog="Example: growth-ds train configs/run/demo.yaml --ranks 2 --set stages.0.steps=50")
def train(
    config: Config,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run. Default: ./runs/<config name>/.")] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Start so many ranks by deepspeed. Default: this process is the one rank.")
    ] = None,
    resume: Annotated[str, typer.Option(help="auto: go on where the folder's run stopped; never: refuse.")] = "auto",
    until: Annotated[
        str | None, typer.Option(help="Train a part: 0:end, or 1:start to grow into 1 too. Default: all.")
    ] = None,
    sets: Sets = None,
) -> None:
    """Train, growing between stages. Under a launcher (deepspeed, torchrun, mpirun) this is one rank."""
    if resume not in ("auto", "never"):
        raise UserError(f"--resume: '{resume}' is neither auto nor never")
    from growth_ds.config_file import load_run
    from growth_ds.part import part_of

    run = load_run(config, sets or ())
    part = part_of(until, len(run.stages))
    folder = run_dir or Path("runs") / run.name
    from growth_ds.engine.places import is_rank
    from growth_ds.engine.signals import StopFlag

    with StopFlag() as stop:  # from here on: loading torch and the text takes long enough to be stopped in
        if ranks is not None and not is_rank():
            from growth_ds.launch import train_ranks

            raise typer.Exit(train_ranks(config, folder, ranks, resume, list(sets or ()), stop, until))
        from growth_ds.trainer import train as train_here

        raise typer.Exit(train_here(run, folder, resume == "auto", stop, part))


@app.command(epilog="Example: growth-ds compare configs/suite/s.yaml --seeds 1 --budget 5m")
def compare(
    suite: Annotated[Path, typer.Argument(help="A suite's YAML file, for example configs/suite/s.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of all its runs. Default: ./runs/<file name>/.")] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="So many of its seeds, the first ones. Default: all.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Of the from-scratch run: FLOPs (3e14) or a time here (90s, 20m, 2h). Default: the suite's."),
    ] = None,
    methods: Annotated[str, typer.Option(help="These of its methods, with commas between. Default: all.")] = "",
    ranks: Ranks = 1,
    as_json: Json = False,
) -> None:
    """Run growth methods against training from scratch on one text. Goes on where it stopped, however it stopped."""
    from growth_ds.suite import compare as comparison
    from growth_ds.suite.page import PAGE
    from growth_ds.suite.tables import print_table

    with comparison.on_stderr(as_json):
        names = [name.strip() for name in methods.split(",") if name.strip()]
        opened = comparison.open_suite(suite, out or Path("runs") / suite.stem, seeds, budget, typer.echo, names)
        code = comparison.run_suite(opened, ranks, typer.echo)
    if code in (comparison.DONE, 1):
        rows = comparison.read_rows(opened)
        if as_json:
            typer.echo(json.dumps(rows, indent=1))
        else:
            print_table(rows, comparison.known_baselines(opened))
            typer.echo(f"{opened.out / PAGE}")
    raise typer.Exit(code)


@app.command(epilog="Example: growth-ds report runs/demo runs/demo/scratch --out report.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders: the one that the page is about, then others.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: report.html in the first run's folder.")] = None,
    layers: Annotated[bool, typer.Option(help="Look into kept checkpoints: attention and weights of layers.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the page that is there.")] = False,
) -> None:
    """Write one self-contained HTML page: curves, growths, layers before and after, what it was and ran on."""
    from growth_ds.reporting import report as write

    typer.echo(write(runs, out, layers, force))


@app.command(epilog="Example: growth-ds demo")
def demo(
    run_dir: Annotated[Path, typer.Option(help="Folder that all of it goes to.")] = Path("runs/demo"),
    ranks: Ranks = 2,
    sets: Sets = None,
) -> None:
    """Grow a BERT on the text of the installed Python library, beside a control from scratch. No network, no data."""
    from growth_ds.demo import run_demo

    raise typer.Exit(run_demo(run_dir, ranks, list(sets or ())))
