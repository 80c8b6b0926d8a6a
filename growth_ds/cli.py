"""`growth-ds`: parses, calls, exits. Every heavy import waits until its verb runs.

Exit codes: 0 done, 2 something the user gave cannot be used (one line on stderr), 75 stopped and saved, else a crash.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from growth_ds.errors import GrowthFailed, UserError

app = typer.Typer(
    name="growth-ds",
    help="Progressive-growth pre-training of BERT on DeepSpeed: start small, grow while training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
USER_ERROR = 2

Config = Annotated[Path, typer.Argument(help="A run's YAML file, for example configs/run/demo.yaml.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="Override a key: stages.0.steps=10. May be repeated.")]
Ranks = Annotated[int, typer.Option("--ranks", min=1, help="Processes on this machine.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out.")]
CheckpointPath = Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder (its newest whole one).")]


@app.callback()
def root(local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0) -> None:
    """Launchers put --local_rank before the verb; the environment says the same."""


@app.command(epilog="Example: growth-ds prepare corpus/*.jsonl.gz --out data/wiki --vocab-size 16000")
def prepare(
    inputs: Annotated[list[str], typer.Argument(help=".txt, .jsonl (field text), plain, .gz or .zst; folders, globs.")],
    out: Annotated[Path, typer.Option(help="Folder of the store.")],
    tokenizer: Annotated[
        str, typer.Option(help="sentencepiece, a vocab.txt, or a tokenizer folder.")
    ] = "sentencepiece",
    vocab_size: Annotated[int, typer.Option(min=16, help="Pieces, for sentencepiece.")] = 8192,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: all cores.")] = None,
    valid: Annotated[float, typer.Option(help="Share of the documents kept for validation.")] = 0.02,
    errors: Annotated[str, typer.Option(help="Text that is not UTF-8: 'strict' stops, 'replace' goes on.")] = "strict",
    force: Force = False,
) -> None:
    """Turn text into a store: tokens on disk, memory-mapped, with their tokenizer."""
    from growth_ds.data.prepare import prepare as build

    if errors not in ("strict", "replace"):
        raise UserError(f"--errors: '{errors}' is neither strict nor replace")
    options: dict[str, Any] = {"tokenizer": tokenizer, "vocab_size": vocab_size, "workers": workers}
    store = build(inputs, out, **options, valid=valid, errors=errors, force=force)
    for name in ("train", "valid"):
        split = store.split(name)
        typer.echo(f"{out}: {name} {split.tokens:,} tokens in {split.documents:,} documents")


@app.command(epilog="Example: growth-ds plan configs/run/bert-large-stack.yaml --ranks 8")
def plan(
    config: Config,
    ranks: Ranks = 1,
    fit: Annotated[bool, typer.Option("--fit", help="Also try micro-batches here, by training steps.")] = False,
    as_json: Json = False,
    sets: Sets = None,
) -> None:
    """Show what a run costs and what each growth does. Needs no data and, without --fit, allocates nothing."""
    from growth_ds.config_file import load_run
    from growth_ds.optim.curve import BLOCKS, curve, drawing
    from growth_ds.planning import plan_run, print_plan

    run = load_run(config, sets or ())
    record = plan_run(run, ranks)
    record["lr"] = curve(run)
    if not as_json:
        print_plan(record)
        is_utf = (sys.stdout.encoding or "").lower().startswith("utf")
        typer.echo("\n".join(drawing(record["lr"], BLOCKS if is_utf else "#")))
    if fit:
        from growth_ds.fit import fit_run, print_fit

        record["fit"] = fit_run(run, ranks, say=lambda line: typer.echo(line, err=True))
        if not as_json:
            print_fit(record["fit"])
    if as_json:
        typer.echo(json.dumps(record, indent=1))


@app.command(epilog="Example: growth-ds train configs/run/demo.yaml --ranks 2 --set stages.0.steps=50")
def train(
    config: Config,
    run_dir: Annotated[Path | None, typer.Option(help="Default: ./runs/<config name>/.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Start so many ranks with deepspeed's launcher.")] = None,
    resume: Annotated[str, typer.Option(help="auto: go on where the folder's run stopped; never: refuse.")] = "auto",
    until: Annotated[str | None, typer.Option(help="A part: 0:end trains stage 0, 1:start also grows into 1.")] = None,
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


@app.command(
    epilog="Example: growth-ds launch --hostfile hosts -- train configs/run/demo.yaml",
    context_settings={"allow_interspersed_args": False},
)
def launch(
    argv: Annotated[list[str], typer.Argument(metavar="-- train CONFIG ...", help="What every rank runs.")],
    ranks: Annotated[int | None, typer.Option(min=1, help="So many: here, or with --slurm or --mpi in all.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="Lines `n1 slots=2`: hosts that ssh reaches.")] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="With srun, inside a job.")] = False,
    mpi: Annotated[bool, typer.Option("--mpi", help="With Open MPI's mpirun.")] = False,
    interface: Annotated[
        str | None, typer.Option(help="Network between the hosts: eth0. Default: the way to the first host.")
    ] = None,
    master_addr: Annotated[str | None, typer.Option(help="Address of the first host, as the others reach it.")] = None,
    master_port: Annotated[int | None, typer.Option(help="A free port there.")] = None,
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


@app.command(epilog="Example: growth-ds grow runs/demo --recipe stack --times 2 --out grown")
def grow(
    source: CheckpointPath,
    recipe: Annotated[str, typer.Option(help="A name (`growth-ds recipes`), a Python file, or a YAML `grow:` block.")],
    out: Annotated[Path, typer.Option(help="Folder of the grown checkpoint.")],
    to: Annotated[Path | None, typer.Option(help="YAML with the keys of a `model:` block; missing ones stay.")] = None,
    times: Annotated[int | None, typer.Option(min=2, help="Instead of --to: width (or depth) so often.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Say what happens to every tensor.")] = False,
    as_json: Json = False,
    force: Force = False,
    finish_ramp: Annotated[bool, typer.Option("--finish-ramp", help="In the middle of a ramp: grow its end.")] = False,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A key of the `grow:` block: ramp=500.")] = None,
    store: Annotated[Path | None, typer.Option(help="For moebert: text to measure units on.")] = None,
) -> None:
    """Grow a checkpoint: weights and, if it has them, both Adam moments."""
    from growth_ds import offline
    from growth_ds.config_file import load_grow, load_model
    from growth_ds.planning import describe, enlarged

    if (to is None) == (times is None):
        raise UserError("grow: give either --to MODEL.yaml or --times N")
    policy = load_grow(recipe, overrides=sets or ())
    checkpoint = offline.find_checkpoint(source)
    target = load_model(to, checkpoint.model) if to else enlarged(checkpoint.model, policy, times or 1)
    made = offline.grow_checkpoint(checkpoint, target, policy, out, force, finish_ramp, store)
    if as_json:
        record = made.to_json() | ({"tensors": made.tensors()} if tensors else {})
        typer.echo(json.dumps(record, indent=1))
    else:
        for line in describe(made, tensors) or ["no axis grew"]:
            typer.echo(line)
        typer.echo(f"{out}: {'exact' if made.exact else 'not exact'}, digest {made.digest()[:12]}")


@app.command(epilog="Example: growth-ds inspect runs/demo --verify")
def inspect(
    source: Annotated[Path, typer.Argument(help="A checkpoint folder, or a run folder (what its `latest` names).")],
    digest: Annotated[bool, typer.Option("--digest", help="SHA-256 of the state, whoever wrote it.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every byte with the manifest.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds. Reads its manifest alone unless asked for more, and writes nothing."""
    from growth_ds import inspection

    record = inspection.inspect(source, digest, verify)
    typer.echo(json.dumps(record, indent=1) if as_json else "\n".join(inspection.lines(record)))


@app.command(epilog="Example: growth-ds recipes --json")
def recipes(as_json: Json = False) -> None:
    """List the growth methods: which axes they grow, when they keep the function, their paper."""
    from growth_ds.planning import print_recipes, recipe_records

    typer.echo(json.dumps(recipe_records(), indent=1)) if as_json else print_recipes()


@app.command(epilog="Example: growth-ds evaluate runs/demo --task cola,rte --data glue --seeds 5")
def evaluate(
    source: Annotated[Path, typer.Argument(help="A checkpoint, a run folder; for --task also a Hugging Face folder.")],
    store: Annotated[Path | None, typer.Option(help="Measure MLM loss and accuracy on its validation split.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; default: 128, or the model's positions.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read at most.")] = 262144,
    logits: Annotated[Path | None, typer.Option(help="npz with ids, mask, types: write our logits for them.")] = None,
    task: Annotated[
        str | None, typer.Option(help="Fine-tune on: cola,rte, ... squad, or a text<TAB>label file.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of GLUE's (CoLA/train.tsv) or SQuAD's files.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunings of each task.")] = 5,
    out: Annotated[Path | None, typer.Option(help="npz of --logits: mlm [B,T,V], nsp [B,2]; JSON of --task.")] = None,
    ramp: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Progress of a growth's ramp; default: the checkpoint's own.")
    ] = None,
    as_json: Json = False,
    force: Force = False,
    finish_ramp: Annotated[
        bool, typer.Option("--finish-ramp", help="For --task, in a growth's ramp: its end.")
    ] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", help="Of --task: lr, epochs, batch, length, limit.")
    ] = None,
) -> None:
    """Measure a model on a store or by fine-tuning on tasks, or write the logits of our own forward."""
    if task is not None and store is None and logits is None:
        from growth_ds.downstream import print_tasks

        return print_tasks(source, task, data, seeds, out, as_json, force, finish_ramp, sets or ())
    from growth_ds import offline

    if (store is None) == (logits is None) or (logits is None) != (out is None) or task is not None:
        raise UserError("evaluate: give either --store STORE, or --logits IN.npz with --out OUT.npz, or --task NAMES")
    checkpoint = offline.find_checkpoint(source)
    if store is not None:
        record: dict[str, Any] = offline.evaluate_store(checkpoint, store, length, tokens, ramp)
        lines = [f"{key}: {value:.6g}" for key, value in record.items()]
    else:
        assert logits is not None
        assert out is not None
        shapes = offline.evaluate_logits(checkpoint, logits, out, force, ramp)
        record = {key: list(shape) for key, shape in shapes.items()}
        lines = [f"{out}: {key} {shape}" for key, shape in record.items()]
    typer.echo(json.dumps(record) if as_json else "\n".join(lines))


@app.command(epilog="Example: growth-ds export runs/demo --out my-bert")
def export(
    source: CheckpointPath,
    out: Annotated[Path, typer.Option(help="Folder that transformers opens.")],
    finish_ramp: Annotated[
        bool, typer.Option("--finish-ramp", help="In the middle of a growth's ramp: its end.")
    ] = False,
    force: Force = False,
) -> None:
    """Write a Hugging Face folder: config, safetensors, tokenizer. Of a model with experts, one with its own loader."""
    from growth_ds import offline

    offline.check_free(out, force)
    checkpoint = offline.find_checkpoint(source)
    offline.export_checkpoint(checkpoint, out, force, finish_ramp)
    opened = f"transformers.AutoModelForMaskedLM.from_pretrained('{out}')"
    typer.echo(f"{out}: open with {opened if checkpoint.model.experts == 1 else 'load of its expert_bert.py'}")


@app.command("import", epilog="Example: growth-ds import bert-base-uncased/ --out checkpoints/bert-base")
def import_(
    source: Annotated[Path, typer.Argument(help="A Hugging Face folder of a BERT or MegatronBert.")],
    out: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    force: Force = False,
) -> None:
    """Turn a Hugging Face folder into a checkpoint (without optimizer state)."""
    from growth_ds import offline
    from growth_ds.model.cost import parameters

    model = offline.import_checkpoint(source, out, force)
    typer.echo(f"{out}: {model.layers} layers of {model.hidden}, {parameters(model):,} parameters")


@app.command(epilog="Example: growth-ds convert out/deepspeed --model bert.yaml --out checkpoints/from-deepspeed")
def convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint, a run folder, or a DeepSpeed folder (or its tag).")],
    out: Annotated[Path, typer.Option(help="Folder that is written.")],
    to: Annotated[str, typer.Option(help="checkpoint, or universal: for DeepSpeed's load_universal.")] = "checkpoint",
    model: Annotated[Path | None, typer.Option(help="Sizes: YAML with the keys of `model:`, or a config.json.")] = None,
    zero: Annotated[int, typer.Option(help="Stage that loads a universal folder; 1 or 2 serve all of 0.19.")] = 2,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose tokenizer goes into the checkpoint.")] = None,
    force: Force = False,
) -> None:
    """Read DeepSpeed's checkpoint folders, rigid and universal, or write a universal one."""
    from growth_ds import convert as conversion

    sizes = conversion.read_model(model) if model is not None else None
    lines = conversion.convert(source, out, to=to, model=sizes, zero=zero, force=force, tokenizer=tokenizer)
    typer.echo("\n".join(lines))


@app.command(epilog="Example: growth-ds compare configs/suite/s.yaml --seeds 1 --budget 5m")
def compare(
    suite: Annotated[Path, typer.Argument(help="A suite's YAML file, for example configs/suite/s.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder of all its runs. Default: ./runs/<file name>/.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="The first so many of its seeds.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Of the from-scratch run: FLOPs (3e14) or a time here (90s, 20m, 2h).")
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


@app.command(epilog="Example: growth-ds doctor --json")
def doctor(as_json: Json = False) -> None:
    """Show versions and devices, and which implementation every fused op takes here and why."""
    from growth_ds import doctor as examination

    record = examination.examine()
    typer.echo(json.dumps(record, indent=1) if as_json else "\n".join(examination.lines(record)))


@app.command(epilog="Example: growth-ds demo")
def demo(
    run_dir: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    ranks: Ranks = 2,
    sets: Sets = None,
) -> None:
    """Grow a BERT on the text of the installed Python library, beside a control from scratch. No network, no data."""
    from growth_ds.demo import run_demo

    raise typer.Exit(run_demo(run_dir, ranks, list(sets or ())))


def main() -> None:
    """The console script."""
    usage_error: Any = typer.BadParameter.__mro__[2]  # ClickException: typer 0.16 and later may bring their own click
    try:
        code = app(standalone_mode=False) or 0
    except UserError as error:
        code = _refuse(str(error), USER_ERROR, everywhere=getattr(error, "on_this_rank", False))
    except GrowthFailed as error:
        code = _refuse(str(error), 1)
    except usage_error as error:
        code = _refuse(f"growth-ds: {error.format_message()} See growth-ds --help.", USER_ERROR)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if "growth_ds.engine.distributed" in sys.modules:
        _leave(code)
    sys.exit(code)


def _refuse(line: str, code: int, everywhere: bool = False) -> int:
    """One line, from one rank; `everywhere`: from each that finds it, as the others may find nothing."""
    from growth_ds.engine.places import first_guess

    if everywhere or first_guess() == "0":
        print(" ".join(line.split()), file=sys.stderr)
    return code


def _leave(code: int) -> None:
    """The end of a rank: say how it ended, and let no launcher's signal turn that into a crash."""
    import signal

    from growth_ds.engine.distributed import shutdown
    from growth_ds.engine.reports import report_exit

    if "RANK" in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    report_exit(code)
    shutdown()
