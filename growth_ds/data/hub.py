"""`growth-ds prepare hf:NAME`: a dataset of Hugging Face's `datasets` as a text file that the readers know.

    hf:NAME[:CONFIG[:SPLIT]]    the split's column `text`; NAME may be a folder here (`save_to_disk`, or of JSON lines)

`evaluate --task cola --data hf:nyu-mll/glue` reads its rows by the same door (`evaluate/glue.py`). The package is asked
for at that moment alone; `prepare`'s rows are streamed into one `.jsonl` beside the store, which goes when
the store is made.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growth_ds.errors import UserError

PREFIX = "hf:"
_SPLIT = "train"


@contextmanager
def local(inputs: Sequence[str], out: Path) -> Iterator[list[str]]:
    """The inputs, with every `hf:` one as a file that is there until the end. Raises UserError."""
    if not any(each.startswith(PREFIX) for each in inputs):
        yield list(inputs)
        return
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.hf-", dir=out.absolute().parent))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give another --out", "GDS-O01") from None
    try:
        files = [str(_written(each, folder)) if each.startswith(PREFIX) else each for each in inputs]
        yield files
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _written(given: str, folder: Path) -> Path:
    """The rows of a dataset as JSON lines: ids are `NAME:row`, from 0."""
    name, config, split = _parts(given)
    path = folder / f"{name.strip('/').replace('/', '--')}-{config or ''}-{split}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows(given, name, config, split)):
            text = row.get("text")
            if not isinstance(text, str):
                columns = ", ".join(row)
                raise UserError(f"{given}: row {number} has no text in a column `text` (there are {columns})")
            file.write(json.dumps({"id": f"{name}:{number}", "text": text}) + "\n")
    return path


def _parts(given: str) -> tuple[str, str | None, str]:
    """(name or folder, configuration or None, split). Raises UserError."""
    name, *rest = given.removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2:
        raise UserError(f"{given}: not of the form hf:NAME[:CONFIG[:SPLIT]]")
    config, split = (*rest, "", "")[:2]
    return name, config or None, split or _SPLIT


def rows(given: str, name: str, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of one split, in order, with labels by their names where the dataset has names. Raises UserError.

    `name`: of the hub, or a folder here: of `save_to_disk` (with a `config`, the folder of that name in it), or of
    files that `datasets` reads. `given`: how the user wrote it.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{given}: datasets is not installed; pip install 'growth_ds[datasets]'") from None
    for package in ("datasets", "huggingface_hub"):
        logging.getLogger(package).setLevel(logging.ERROR)  # five retries are no news; the last one's error is
    saved = Path(name, config or "")
    try:
        if (saved / "state.json").is_file() or (saved / "dataset_dict.json").is_file():
            held = datasets.load_from_disk(str(saved))
            found = held[split] if isinstance(held, datasets.DatasetDict) else held
        else:
            found = datasets.load_dataset(name, config, split=split, streaming=True)
        names = getattr((getattr(found, "features", None) or {}).get("label"), "names", None)
        for row in found:
            yield row if names is None or row["label"] < 0 else {**row, "label": names[row["label"]]}
    except Exception as error:  # of the network, the hub, the formats: whatever it is, in one line
        line = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")[:200]
        raise UserError(
            f"{given}: cannot be loaded ({type(error).__name__}: {line}); check name, configuration, split and network"
        ) from None
