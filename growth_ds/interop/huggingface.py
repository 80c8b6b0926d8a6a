"""Import from and export to the folders that transformers' `from_pretrained` and `save_pretrained` use.

Post-LN models are transformers' Bert, pre-LN ones its MegatronBert. Both directions follow one table (`names.py`), so
an import that is exported again gives the same tensors, bit for bit. transformers itself is not needed.

RoBERTa, XLM-R and CamemBERT compute what a post-LN BERT does, and differ in their folder: the names, and the position
table, whose row `pad_token_id + 1` is that of the first real token. The rows before it are read by padding alone, which
nothing attends to. So our table has the real positions (a growth that copies positions must not meet the others), the
key `family` of the model says whose folder it is, and the rows of an imported one wait among the checkpoint's facts
(`unread_positions`) for an export. Where they are missing or of another width, after a growth, an export writes zeros.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from growth_ds.checkpoint.manifest import MANIFEST
from growth_ds.config import Model
from growth_ds.errors import UserError
from growth_ds.files import replace_folder, sync
from growth_ds.growth.product import whole
from growth_ds.interop import names
from growth_ds.interop.tensor_files import TensorFiles
from growth_ds.interop.tokenizer_files import BEGIN, END, PAD, VOCABULARIES, copy_tokenizer, token_id
from growth_ds.model.init import initial
from growth_ds.model.layout import parameter_shapes

POSITION = "embeddings.position.weight"
FRESH_SEED = 0
"""Seed of the heads that a file lacks."""


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere."""

    model: Model
    weights: Mapping[str, Tensor]
    """Our parameter names -> fp32 tensors, each read when asked for."""
    tokenizer: Path | None
    """The folder, if it holds a tokenizer too."""
    has_head: bool = True
    """Whether the folder has an MLM head; else that of `weights` is fresh."""
    unread: Tensor | None = None
    """Of other families than BERT: rows [pad_token_id + 1, hidden] before the first real position, fp32."""


class _Weights(Mapping[str, Tensor]):
    """Our names over their files."""

    def __init__(self, model: Model, files: TensorFiles, keys: Mapping[str, tuple[str, ...]], unread: int) -> None:
        self._model, self._files, self._keys, self._unread = model, files, keys, unread
        self._names = list(parameter_shapes(model))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys:
            if name in self._names:
                return initial(self._model, name, FRESH_SEED)
            raise KeyError(name)
        parts = [self._files.read(key) for key in self._keys[name]]
        if name == POSITION:
            return parts[0][self._unread :]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_huggingface(folder: str | Path) -> Imported:
    """A model saved by transformers: `Bert*`, `MegatronBert*`, `Roberta*`, `XLMRoberta*` or `Camembert*`, with or
    without heads, of any age.

    Has the file no MLM head, the model gets a fresh one; has it no next-sentence head, it gets none (and loses its
    pooler); a task head is left out. One line on stderr says so. Raises UserError for a model that ours cannot be.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = TensorFiles(folder)
    base, unread = names.base_of(config["model_type"]), unread_rows(folder, config)
    found = _canonical_keys(files, base)
    model = model_of(folder, config, nsp=False)
    if model.family == "bert":
        nsp = all(key in found for name in names.NSP_NAMES for key in names.their_names(model, name))
        model = model.model_copy(update={"nsp": nsp})
    table = names.name_map(model)
    notes = []
    has_head = any(key in found for name in names.HEAD_NAMES for key in table[name])
    if not has_head:
        table = {name: keys for name, keys in table.items() if name not in names.HEAD_NAMES}
        notes.append(f"no MLM head, a fresh one is made with seed {FRESH_SEED}")
    _check_tensors(folder, model, table, files, found, unread)
    notes += _left_out(table, files, found, base)
    if notes:
        print(f"{folder}: {'; '.join(notes)}", file=sys.stderr)
    keys = {name: tuple(found[key] for key in keys) for name, keys in table.items()}
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARIES)
    return Imported(
        model,
        _Weights(model, files, keys, unread),
        folder if has_tokenizer else None,
        has_head,
        files.read(keys[POSITION][0])[:unread] if unread else None,
    )


def is_huggingface(path: Path) -> bool:
    """Whether a folder is one of transformers', and not a checkpoint of ours."""
    return (path / "config.json").is_file() and not (path / MANIFEST).is_file()


def unread_rows(folder: Path, config: Mapping[str, Any]) -> int:
    """Rows of the position table before the first that a real token reads. Raises UserError."""
    if names.base_of(config["model_type"]) == "bert.":
        return 0
    pad, rows = config.get("pad_token_id", 1), config.get("max_position_embeddings")
    rows = names.CONFIG_DEFAULTS["max_position_embeddings"] if rows is None else rows
    if type(pad) is not int or type(rows) is not int or not 0 <= pad < rows - 1:
        where = f"{folder / 'config.json'}: pad_token_id: {json.dumps(pad)}"
        raise UserError(f"{where} leaves no row of {json.dumps(rows)} max_position_embeddings; correct one of them")
    return pad + 1


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a Hugging Face folder (no config.json); give one written by save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: holds {type(config).__name__}, not a model's configuration; fetch it again")
    for key, values in names.SUPPORTED.items():
        given = config.get(key)
        if key == "hidden_act" and names.base_of(config["model_type"]) != "bert.":
            values = names.ROBERTA_ACTIVATIONS
        if given not in values and (given is not None or key == "model_type"):  # null stands for the default
            choices = " or ".join(json.dumps(value) for value in values)
            raise UserError(f"{path}: {key}: {json.dumps(given)} is not supported; use a model with {choices}")
    return config


def model_of(folder: Path, config: dict[str, Any], nsp: bool) -> Model:
    path, kind = folder / "config.json", config["model_type"]
    given: dict[str, Any] = {"norm": "pre" if kind == "megatron-bert" else "post", "nsp": nsp}
    given["family"] = "bert" if kind == "megatron-bert" else kind
    for ours, theirs in names.CONFIG.items():
        value = config.get(theirs)
        given[ours] = names.CONFIG_DEFAULTS.get(theirs) if value is None else value
        if given[ours] is None:
            raise UserError(f"{path}: {theirs}: this key is required; add it")
    given["activation"] = names.ACTIVATIONS[given["activation"]]
    if unread := unread_rows(folder, config):
        given["positions"] -= unread
    try:
        return Model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = names.CONFIG.get(str(first["loc"][0]), "") if first["loc"] else "num_attention_heads"
        raise UserError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}; correct it") from None


def _canonical_keys(files: TensorFiles, base: str) -> dict[str, str]:
    """Present name -> name in the files; the encoder's begin with `base`."""
    found: dict[str, str] = {}
    for key in files.shapes:
        name = names.canonical(key, base)
        if name is None:
            continue
        if name in found:
            raise UserError(f"{files.path(key)}: holds both '{found[name]}' and '{key}'; keep one of them")
        found[name] = key
    for copy, name in names.TIED.items():
        if copy in found and name not in found:  # which of two tied names is kept has changed over the years
            found[name] = found.pop(copy)
    return found


def _check_tensors(
    folder: Path, model: Model, table: Mapping[str, tuple[str, ...]], files: TensorFiles, found: Mapping[str, str],
    unread: int,
) -> None:  # fmt: skip
    """Raises UserError for the first tensor that is missing, of another shape than config.json says, or not tied."""
    shapes = parameter_shapes(model)
    for name, keys in table.items():
        expected = names.part_shape(shapes[name], len(keys))
        if name == POSITION:
            expected = (expected[0] + unread, *expected[1:])
        for key in keys:
            if key not in found:
                raise UserError(f"{folder}: tensor '{key}' is missing from the weights; save the whole model again")
            actual = files.shapes[found[key]]
            if actual != expected:
                where = f"{files.path(found[key])}: tensor '{found[key]}'"
                raise UserError(
                    f"{where}: has shape {list(actual)}, config.json says {list(expected)}; correct config.json"
                )
    for copy, name in names.TIED.items():
        if copy in found and not torch.equal(files.read(found[copy]), files.read(found[name])):
            problem = f"'{copy}' differs from '{name}', and ours are one tensor; use a model with a tied decoder"
            raise UserError(f"{files.path(found[copy])}: {problem}")


def _left_out(
    table: Mapping[str, tuple[str, ...]], files: TensorFiles, found: Mapping[str, str], base: str
) -> list[str]:
    """Notes on tensors that are not taken over. Raises UserError where the encoder itself would compute with one."""
    used = {key for keys in table.values() for key in keys} | set(names.TIED)
    rest = [key for key in found if key not in used]
    for key in rest:
        if key.startswith(base) and not key.startswith(f"{base}pooler."):
            where = f"{files.path(found[key])}: tensor '{found[key]}'"
            raise UserError(f"{where} has no place in the model of config.json; correct config.json")
    modules = sorted({key.rpartition(".")[0] for key in rest})
    return [f"left out: {', '.join(modules)}"] if modules else []


def write_huggingface(
    model: Model,
    read: Callable[[str], Tensor],
    out: str | Path,
    tokenizer: Path | None = None,
    force: bool = False,
    unread: Tensor | None = None,
    has_head: bool = True,
    card: str = "",
) -> None:
    """Write a folder that `AutoModelForMaskedLM.from_pretrained(out)` opens: config.json, model.safetensors, tokenizer.

    `read` gives the tensor of each parameter name, `unread` rows are as `Imported` has them; without `has_head` the
    folder is that of a class without MLM head; `card` is its README.md. Shared layers are written once for each depth,
    and low-rank feed-forward matrices multiplied out; both are exact. The folder appears whole or not at all. Raises
    UserError for a shape that transformers cannot hold, and for an existing `out` unless `force`; then only an earlier
    export (or an empty folder) is replaced.
    """
    out = Path(out).resolve()
    if model.ffn_rank is not None:
        read, model = whole(parameter_shapes(model), read), model.model_copy(update={"ffn_rank": None})
    if model.experts > 1:
        raise UserError(f"{out}: transformers holds no BERT with experts; growth-ds export writes a folder of its own")
    if model.light_every is not None:
        raise UserError(f"{out}: transformers holds no model with light attention; export after it has ended")
    if model.thin_ffn is not None:
        raise UserError(f"{out}: transformers holds no model with thin_ffn layers; export after they have grown")
    if model.heads * model.head_size != model.hidden:
        raise UserError(
            f"{out}: transformers holds no model with heads {model.heads} x head_size {model.head_size} != hidden "
            f"{model.hidden}; export before one of them grows alone, or grow the other until hidden is the product"
        )

    def fill(folder: Path) -> None:
        write_card(folder, card)
        _write_files(model, read, folder, tokenizer, unread, has_head)

    write_whole(out, force, fill)


def write_whole(out: Path, force: bool, fill: Callable[[Path], None]) -> None:
    """Have `fill` write the files of an exported model into a folder that appears at `out` whole or not at all.

    Raises UserError for an existing `out` unless `force`; then only an earlier export (or an empty folder) is replaced.
    """
    out = out.resolve()
    _check_free(out, force)
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in temporary.iterdir():
            sync(path)
        replace_folder(temporary, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error}); give a folder that can") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_card(folder: Path, card: str) -> None:
    """README.md of an exported folder, if there is anything to write."""
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out}: exists; give another --out, or --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UserError(f"{out}: exists and is not an exported model; --force replaces only those")


def _write_files(
    model: Model, read: Callable[[str], Tensor], folder: Path, tokenizer: Path | None, unread: Tensor | None,
    has_head: bool,
) -> None:  # fmt: skip
    from safetensors.torch import save_file

    copy_tokenizer(tokenizer, folder, model.positions)
    kind = names.model_type(model)
    config = {
        "architectures": [names.class_of(model, has_head)],
        "model_type": kind,
        **names.config_of(model),
        "pad_token_id": token_id(folder, PAD, default=0),
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    tensors = _their_tensors(model, read)
    if model.family != "bert":
        rows = _unread(model, folder, unread)
        (key,) = names.their_names(model, POSITION)
        tensors[key] = torch.cat([rows, tensors[key]])
        config |= {"pad_token_id": len(rows) - 1, "max_position_embeddings": len(tensors[key])}
        config |= {"bos_token_id": token_id(folder, BEGIN, 0), "eos_token_id": token_id(folder, END, 2)}
    if not has_head:
        heads = {key for name in names.HEAD_NAMES for key in names.their_names(model, name)}
        # As transformers writes a class that is the encoder alone: without the prefix.
        base = "" if model.nsp else names.base_of(kind)
        tensors = {key.removeprefix(base): tensor for key, tensor in tensors.items() if key not in heads}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _unread(model: Model, folder: Path, given: Tensor | None) -> Tensor:
    """The rows before the first real position: the last of them is that of the padding token, by its id."""
    if given is None:
        return torch.zeros(token_id(folder, PAD, default=1) + 1, model.hidden)
    return given if given.shape[1] == model.hidden else torch.zeros(len(given), model.hidden)


def _their_tensors(model: Model, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """transformers' names -> fp32 tensors that share no memory. Raises ValueError for a tensor of another shape."""
    tensors: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(model).items():
        tensor = read(name).detach().to(device="cpu", dtype=torch.float32)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"'{name}' has shape {tuple(tensor.shape)}, the model says {shape}")
        depths: list[int | None] = [None]
        if name.startswith("layers."):
            own = int(name.split(".")[1])
            depths = [depth for depth, stored in enumerate(model.layer_order) if stored == own]
        for depth in depths:
            keys = names.their_names(model, name, depth)
            for key, part in zip(keys, tensor.chunk(len(keys)), strict=True):
                tensors[key] = part.clone(memory_format=torch.contiguous_format)
    return tensors
