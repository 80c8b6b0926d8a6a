"""Every kind of error that a user can cause: its code, its cause and its cure. `docs/errors.md` is made of it.

    python -m growth_ds.catalogue > docs/errors.md

A code never changes its meaning and is never given again. An error's code follows from the module that found it, unless
the place that raises it says another.
"""

from __future__ import annotations

from dataclasses import dataclass

from growth_ds.errors import UserError

USAGE = "GDS-U01"
DENIED = "GDS-O02"


@dataclass(frozen=True)
class Kind:
    """One kind of error: what it is, why it happens, what to do."""

    title: str
    cause: str
    cure: str


CATALOGUE = {
    USAGE: Kind(
        "command line",
        "A verb, an option or its value is unknown, missing, or contradicts another option.",
        "`growth-ds VERB --help` lists the options with their values and defaults.",
    ),
    "GDS-O01": Kind(
        "output",
        "What would be written is there already, cannot be replaced, or its folder cannot be written.",
        "Give another `--out` or `--run-dir`, make room, or give `--force` where the line says so.",
    ),
    DENIED: Kind(
        "permission",
        "The system refuses this user a file or folder.",
        "Change the rights of the path in the line, or run as a user who has them.",
    ),
    "GDS-C01": Kind(
        "config file",
        "A YAML or JSON file is missing, not text, not valid, or holds no mapping of keys.",
        "Correct the file at the line that is named; `configs/` has whole ones.",
    ),
    "GDS-C02": Kind(
        "config key",
        "A key is unknown, missing, or has a value that it cannot have.",
        "The line names the key and the nearest known one. The README lists those of `grow:`, `until:` and stages; a "
        "run folder's `config.yaml` shows every default.",
    ),
    "GDS-C03": Kind(
        "override",
        "A `--set` is not `key=value`, or its key leads nowhere.",
        "Give the path of a key as in the YAML file, with indexes for lists: `--set stages.0.steps=10`.",
    ),
    "GDS-C04": Kind(
        "run that contradicts itself",
        "Keys that are right alone do not go together: sizes, ranks and batches, a start, a package that is missing.",
        "Change one of the keys in the line; `growth-ds plan CONFIG --ranks N` checks without training.",
    ),
    "GDS-D01": Kind(
        "text",
        "Text files are missing, of an unknown kind, damaged, not UTF-8, or hold no text.",
        "Mend or leave out the file and line that is named; `--errors replace` goes on over bytes that are not UTF-8.",
    ),
    "GDS-D02": Kind(
        "tokenizer",
        "A vocabulary or tokenizer cannot be read, lacks special tokens, or cannot be trained on this text.",
        "Give a `vocab.txt` or a folder that transformers wrote, or another `--vocab-size`.",
    ),
    "GDS-D03": Kind(
        "store",
        "A token store is missing, damaged, changed since the run began, or does not suit the run.",
        "Run `growth-ds prepare` again on the same text, or set `data.store` to the right folder.",
    ),
    "GDS-K01": Kind(
        "checkpoint",
        "A checkpoint is missing, damaged, of another format, or not what the verb needs.",
        "`growth-ds inspect CKPT --verify` compares every byte; take another of the run's, or copy it again.",
    ),
    "GDS-K02": Kind(
        "checkpoint that cannot be read now",
        "The system does not give its bytes, or another version wrote it. It may be whole, and nothing older is used.",
        "Mend the file system or install that version; or move the checkpoint away to go on from an older one.",
    ),
    "GDS-K03": Kind(
        "run folder",
        "The folder holds another run, a part of one, or a run whose config, text or checkpoints have changed.",
        "Give the config that the run began with, or another `--run-dir`.",
    ),
    "GDS-K04": Kind(
        "run folder in use",
        "Another process writes to it, or it cannot be locked.",
        "Wait for the holder that is named or stop it; on a file system without locks give another folder.",
    ),
    "GDS-G01": Kind(
        "growth",
        "The model cannot grow so: an axis would shrink, a recipe cannot do the sizes, or `require_exact` forbids it.",
        "Change the sizes or the recipe; `growth-ds recipes` says what each can do, `growth-ds plan` tries it.",
    ),
    "GDS-G02": Kind(
        "recipe",
        "A recipe is unknown, its file cannot be used, or what it answers is no growth of that axis.",
        "`growth-ds recipes` lists the names; `python -m growth_ds.testing FILE.py` holds your own to the laws.",
    ),
    "GDS-G03": Kind(
        "learned growth",
        "LiGO, Mango or an importance of units does not suit these models, or has no text to learn from.",
        "Use another recipe there, or give what the line asks for; these learn within a run, not offline.",
    ),
    "GDS-E01": Kind(
        "ranks",
        "The environment's ranks contradict each other, the machine or the launcher, or another rank failed.",
        "Start through one launcher only, with as many ranks as there are GPUs or hosts' slots; unset stale variables.",
    ),
    "GDS-E02": Kind(
        "engine",
        "A DeepSpeed option, ZeRO stage, precision or implementation of ops cannot be used here.",
        "Remove or change the key in the line; `growth-ds doctor` shows what this machine has.",
    ),
    "GDS-H01": Kind(
        "hosts",
        "A hostfile, host list, address or program for launching on several hosts cannot be used.",
        "Correct the line that is named; `growth-ds doctor --hosts FILE` tries every host, `launch --dry-run` none.",
    ),
    "GDS-I01": Kind(
        "Hugging Face folder",
        "A folder is not a BERT that can be read, is incomplete or damaged, or the model has no form in transformers.",
        "Fetch or save the folder again; for an export, end what transformers cannot hold (the line says what).",
    ),
    "GDS-I02": Kind(
        "DeepSpeed folder",
        "DeepSpeed's files are missing, damaged, need unpickling, or hold another model than was said.",
        "Copy the files of all ranks, and give `--model` with the sizes.",
    ),
    "GDS-T01": Kind(
        "fine-tuning task",
        "A task is unknown, its files are missing or not its own, or its training gave no numbers.",
        "Give `--data` with the task's files as its publisher lays them out, or a file of `text<TAB>label`.",
    ),
    "GDS-S01": Kind(
        "comparison",
        "A suite's methods, seeds or budget do not go together, or its folder holds another suite.",
        "Correct the suite's file, or give another `--out`.",
    ),
    "GDS-R01": Kind(
        "report",
        "A folder has no run, or a run nothing to show yet.",
        "Give a run folder (`runs/NAME`) that has trained at least a step.",
    ),
}  # fmt: skip

AREAS = {
    "growth_ds.cli": USAGE,
    "growth_ds.part": USAGE,
    "growth_ds.hardware": USAGE,
    "growth_ds.forecast": USAGE,
    "growth_ds.reckoning": USAGE,
    "growth_ds.calibration": USAGE,
    "growth_ds.config_file": "GDS-C01",
    "growth_ds.opening": "GDS-C04",
    "growth_ds.planning": "GDS-C04",
    "growth_ds.start": "GDS-C04",
    "growth_ds.fit": "GDS-C04",
    "growth_ds.board": "GDS-C04",
    "growth_ds.model": "GDS-C04",
    "growth_ds.data": "GDS-D03",
    "growth_ds.data.corpus": "GDS-D01",
    "growth_ds.data.pycorpus": "GDS-D01",
    "growth_ds.data.hub": "GDS-D01",
    "growth_ds.data.prepare": "GDS-D01",
    "growth_ds.data.tokenizer": "GDS-D02",
    "growth_ds.data.unigram": "GDS-D02",
    "growth_ds.checkpoint": "GDS-K01",
    "growth_ds.inspection": "GDS-K01",
    "growth_ds.offline": "GDS-K01",
    "growth_ds.during": "GDS-K01",
    "growth_ds.reshard": "GDS-K01",
    "growth_ds.run_folder": "GDS-K03",
    "growth_ds.saving": "GDS-K03",
    "growth_ds.trainer": "GDS-K03",
    "growth_ds.lock": "GDS-K04",
    "growth_ds.coordinator": "GDS-G01",
    "growth_ds.growth": "GDS-G01",
    "growth_ds.growth.answer": "GDS-G02",
    "growth_ds.growth.recipes": "GDS-G01",
    "growth_ds.testing": "GDS-G02",
    "growth_ds.growth.learned": "GDS-G03",
    "growth_ds.learning": "GDS-G03",
    "growth_ds.importance": "GDS-G03",
    "growth_ds.engine": "GDS-E01",
    "growth_ds.engine.ds_config": "GDS-E02",
    "growth_ds.engine.zero": "GDS-E02",
    "growth_ds.ops": "GDS-E02",
    "growth_ds.launching": "GDS-H01",
    "growth_ds.host_check": "GDS-H01",
    "growth_ds.engine.hosts": "GDS-H01",
    "growth_ds.engine.fleet": "GDS-H01",
    "growth_ds.engine.child": "GDS-H01",
    "growth_ds.interop": "GDS-I01",
    "growth_ds.folders": "GDS-I01",
    "growth_ds.convert": "GDS-I02",
    "growth_ds.engine.rigid": "GDS-I02",
    "growth_ds.engine.universal": "GDS-I02",
    "growth_ds.engine.ds_files": "GDS-I02",
    "growth_ds.evaluate": "GDS-T01",
    "growth_ds.downstream": "GDS-T01",
    "growth_ds.suite": "GDS-S01",
    "growth_ds.report": "GDS-R01",
    "growth_ds.reporting": "GDS-R01",
    "growth_ds.rank_logs": "GDS-R01",
}
"""Module or package -> the code of its errors; the longest name that fits counts."""


def code_of(error: UserError) -> str:
    """The code of an error: its own, or that of the module that made it; of one made elsewhere, the command line's."""
    if error.code is not None:
        return error.code
    name = error.made_in
    while name and name not in AREAS:
        name = name.rpartition(".")[0]
    return AREAS.get(name, USAGE)


def explain(code: str) -> str:
    """A few lines about one code, in any case, with or without its brackets. Raises UserError for any other."""
    kind = CATALOGUE.get(code.strip("[]").upper())
    if kind is None:
        raise UserError(f"--explain: '{code[:40]}' is no code; there are {', '.join(CATALOGUE)}", USAGE)
    return f"{code.strip('[]').upper()} {kind.title}\n  why: {kind.cause}\n  fix: {kind.cure}"


def page() -> str:
    """The catalogue as Markdown."""
    lines = [
        "# Errors",
        "",
        "What the user gave cannot be used: exit code 2, and one line on stderr that names the file and key, what is",
        "wrong and the fix, with a code at its end. A code says which kind of error it is and keeps its meaning from",
        "version to version. `growth-ds doctor --explain CODE` prints its entry; `python -m growth_ds.catalogue` all.",
        "",
        "| code | what | why it happens | what to do |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{code}` | {kind.title} | {kind.cause} | {kind.cure} |" for code, kind in CATALOGUE.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page())
