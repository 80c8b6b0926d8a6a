"""Verbs that work on checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from growth_ds.cli.common import CheckpointPath, Force, Json, app
from growth_ds.errors import UserError


@app.command(epilog="Example: growth-ds grow runs/demo --recipe stack --times 2 --out grown")
def grow(
    source: Annotated[Path, typer.Argument(help="A checkpoint, a run folder, or a Hugging Face folder.")],
    recipe: Annotated[str, typer.Option(help="A name (`growth-ds recipes`), a Python file, or a YAML `grow:` block.")],
    out: Annotated[Path, typer.Option(help="Folder of the grown one, of the same kind.")],
    to: Annotated[
        Path | None, typer.Option(help="Instead of --times: YAML with keys of a `model:` block; others stay.")
    ] = None,
    times: Annotated[int | None, typer.Option(min=2, help="Instead of --to: width (or depth) so often.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Say what happens to every tensor.")] = False,
    as_json: Json = False,
    force: Force = False,
    finish_ramp: Annotated[bool, typer.Option("--finish-ramp", help="In the middle of a ramp: grow its end.")] = False,
    sets: Annotated[list[str] | None, typer.Option("--set", help="A key of the `grow:` block: ramp=500.")] = None,
    store: Annotated[Path | None, typer.Option(help="For moebert: text to measure units on. Default: none.")] = None,
) -> None:
    """Grow a checkpoint: weights and, if it has them, both Adam moments. Of a Hugging Face folder: one of its class."""
    from growth_ds import folders, offline
    from growth_ds.config_file import load_grow, load_model
    from growth_ds.interop.huggingface import is_huggingface
    from growth_ds.planning import describe, enlarged

    if (to is None) == (times is None):
        raise UserError("grow: give either --to MODEL.yaml or --times N")
    policy = load_grow(recipe, overrides=sets or ())
    given = folders.Folder(source) if is_huggingface(source) else offline.find_checkpoint(source)
    target = load_model(to, given.model) if to else enlarged(given.model, policy, times or 1)
    if isinstance(given, folders.Folder):
        made = folders.grow_folder(given, target, policy, out, force)
    else:
        made = offline.grow_checkpoint(given, target, policy, out, force, finish_ramp, store)
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
    store: Annotated[
        Path | None, typer.Option(help="With --length and --tokens: MLM loss and accuracy on its validation split.")
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; default: 128, or the model's positions.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens that are read at most.")] = 262144,
    logits: Annotated[
        Path | None, typer.Option(help="Instead: npz with ids, mask, types; write our logits for them.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Instead: fine-tune on cola,rte, ... squad, or a text<TAB>label file.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For --task: folder of GLUE's or SQuAD's files, or hf:nyu-mll/glue.")
    ] = None,
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
    fold: Annotated[
        bool, typer.Option("--fold", help="In the middle of a growth's ramp: as it stands, as far as weights can say.")
    ] = False,
    finish_ramp: Annotated[bool, typer.Option("--finish-ramp", help="In its middle: what it will end in.")] = False,
    force: Force = False,
) -> None:
    """Write a Hugging Face folder with tokenizer and model card. Of a model with experts, one with its own loader."""
    from growth_ds import offline

    offline.check_free(out, force)
    checkpoint = offline.find_checkpoint(source)
    note = offline.export_checkpoint(checkpoint, out, force, finish_ramp, fold)
    if note:
        typer.echo(note)
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
    model: Annotated[
        Path | None, typer.Option(help="Sizes: YAML of `model:` keys, or a config.json. Default: the source's own.")
    ] = None,
    zero: Annotated[int, typer.Option(help="Stage that loads a universal folder; 1 or 2 serve all of 0.19.")] = 2,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose tokenizer goes in. Default: none.")] = None,
    force: Force = False,
) -> None:
    """Read DeepSpeed's checkpoint folders, rigid and universal, or write a universal one."""
    from growth_ds import convert as conversion

    sizes = conversion.read_model(model) if model is not None else None
    lines = conversion.convert(source, out, to=to, model=sizes, zero=zero, force=force, tokenizer=tokenizer)
    typer.echo("\n".join(lines))
