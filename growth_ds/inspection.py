"""`growth-ds inspect`: what a checkpoint holds, from its manifest alone. Opens without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growth_ds.checkpoint.manifest import FORMAT, MANIFEST, Manifest
from growth_ds.errors import UserError
from growth_ds.model.cost import parameters

_NAME = re.compile(r"step-[0-9]+-stage-[0-9]+")


def inspect(source: Path, digest: bool, verify: bool) -> dict[str, Any]:
    """What a checkpoint folder holds, or the one that `latest` names in a run folder. JSON values, all keys always:

        path, format, name (of the run)   whose it is
        model, parameters                 sizes as in a `model:` block; stored weights
        step, stage, tokens, seconds      where the run stood; null where it does not say
        precision, zero, ranks            what wrote it; null where it does not say
        moments, tensors, bytes           whether it has both Adam moments; how many tensors; of all files
        files                             [{"name", "bytes"}, ...]
        ramp                              null, or {"of", "steps", "since", "progress"}; the progress ends at 1
        lr                                axes with learning-rate multipliers
        keep                              why it is never dropped; empty: it goes when newer ones are there
        verified                          whether every byte was compared with the manifest
        digest                            null, or the SHA-256 of the state, whoever wrote it

    That every file is there and as large as it should be is always looked at. Raises UserError.
    """
    path = _checkpoint_path(source)
    manifest = Manifest(path)
    manifest.check_files()
    facts, record = manifest.facts, manifest.files
    known = {key: facts.get(key) for key in ("step", "stage", "tokens", "seconds", "precision", "zero", "ranks")}
    found = {
        "path": str(path),
        "format": FORMAT,
        "name": facts.get("name"),
        "model": manifest.model.model_dump(mode="json"),
        "parameters": parameters(manifest.model),
        **known,
        "moments": manifest.moments,
        "tensors": len(manifest.tensors),
        "bytes": sum(file["bytes"] for file in record.values()),
        "files": [{"name": name, "bytes": file["bytes"]} for name, file in record.items()],
        "ramp": _ramp(facts),
        "lr": list(facts.get("lr", {})),
        "keep": facts.get("keep", []),
        "verified": verify,
        "digest": None,
    }
    if digest or verify:
        from growth_ds.checkpoint.reader import Checkpoint

        checkpoint = Checkpoint(path)
        if verify:
            checkpoint.verify()
        found["digest"] = checkpoint.digest() if digest else None
    return found


def lines(record: Mapping[str, Any]) -> list[str]:
    """The same for a person."""
    model, ramp = record["model"], record["ramp"]
    shared = "" if model["stored_layers"] == model["layers"] else f" ({model['stored_layers']} stored)"
    experts = "" if model["experts"] == 1 else f"{model['experts']} experts of "
    kinds = (("pre-LN", model["norm"] == "pre"), ("nsp", model["nsp"]), (model["family"], model["family"] != "bert"))
    kind = "".join(f", {word}" for word, there in kinds if there)
    rows = [
        ("format", record["format"]),
        ("run", record["name"]),
        ("model", f"{model['layers']} layers{shared} of {model['hidden']}, {model['heads']} heads of "
                  f"{model['head_size']}, {experts}ffn {model['ffn']}, {model['vocab_size']} pieces, "
                  f"{model['positions']} positions{kind}"),
        ("parameters", f"{record['parameters']:,} in {record['tensors']} tensors"),
        ("state", "weights and both moments" if record["moments"] else "weights, no moments"),
        ("step", record["step"]),
        ("stage", record["stage"]),
        ("tokens", None if record["tokens"] is None else f"{record['tokens']:,}"),
        ("written by", _writer(record)),
        ("ramp", ramp and f"{', '.join(ramp['of'])}: {ramp['progress']:.0%} of {ramp['steps']} steps since step "
                          f"{ramp['since']}"),
        ("learning rate", record["lr"] and f"multipliers on {', '.join(record['lr'])}"),
        ("kept", "; ".join(record["keep"]) or "until newer ones are there"),
        ("verified", "every byte" if record["verified"] else "no (--verify compares every byte)"),
        ("digest", record["digest"]),
    ]  # fmt: skip
    shown = [f"{key}: {value}" for key, value in rows if value not in (None, [])]
    files = [f"  {file['name']}  {file['bytes']:,} bytes" for file in record["files"]]
    return [_printable(line) for line in (record["path"], *shown, f"files: {record['bytes']:,} bytes", *files)]


def _checkpoint_path(source: Path) -> Path:
    """The folder itself, or what `latest` names; no other checkpoint is looked for."""
    latest = source / "checkpoints" / "latest"
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; give a checkpoint or a run folder")
    if (source / MANIFEST).exists() or not latest.is_file():
        return source
    try:
        with latest.open(encoding="utf-8", errors="replace") as file:
            name = file.read(200).strip()
    except OSError as error:
        raise UserError(f"{latest}: cannot be read ({error.strerror}); give a checkpoint folder") from None
    if not _NAME.fullmatch(name):
        raise UserError(f"{latest}: names no checkpoint; give the folder of one")
    return latest.parent / name


def _ramp(facts: Mapping[str, Any]) -> dict[str, Any] | None:
    ramp = facts.get("ramp")
    if ramp is None:
        return None
    progress = min(1.0, max(0.0, (facts.get("step", 0) - ramp["since"]) / ramp["steps"]))
    return {"of": list(ramp["start"]), "steps": ramp["steps"], "since": ramp["since"], "progress": progress}


def _writer(record: Mapping[str, Any]) -> str | None:
    zero, ranks, precision = record["zero"], record["ranks"], record["precision"]
    parts = [precision, None if zero is None else f"ZeRO-{zero}", None if ranks is None else f"{ranks} rank(s)"]
    return ", ".join(part for part in parts if part) or None


def _printable(line: str) -> str:
    """Without what moves a terminal's cursor: names and reasons may be a stranger's."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)
