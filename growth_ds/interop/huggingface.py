"""Import from and export to the folders that transformers' `from_pretrained` and `save_pretrained` use.

Post-LN models are transformers' Bert, pre-LN ones its MegatronBert. Both directions follow one table (`names.py`), so
an import that is exported again gives the same tensors, bit for bit. transformers itself is not needed.
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

from growth_ds.config import Model
from growth_ds.errors import UserError
from growth_ds.files import replace_folder, sync
from growth_ds.growth.product import whole
from growth_ds.interop import names
from growth_ds.interop.tensor_files import TensorFiles
from growth_ds.model.init import initial
from growth_ds.model.layout import parameter_shapes

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
"""Files of which a folder needs one to be a tokenizer."""
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


class _Weights(Mapping[str, Tensor]):
    """Our names over their files."""

    def __init__(self, model: Model, files: TensorFiles, keys: Mapping[str, tuple[str, ...]]) -> None:
        self._model, self._files, self._keys = model, files, keys
        self._names = list(parameter_shapes(model))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._keys:
            if name in self._names:
                return initial(self._model, name, FRESH_SEED)
            raise KeyError(name)
        parts = [self._files.read(key) for key in self._keys[name]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_huggingface(folder: str | Path) -> Imported:
    """A model saved by transformers: `Bert*` or `MegatronBert*`, with or without heads, of any age.

    Has the file no MLM head, the model gets a fresh one; has it no next-sentence head, it gets none (and loses its
    pooler); a task head is left out. One line on stderr says so. Raises UserError for a model that ours cannot be.
    """
    folder = Path(folder)
    config = read_config(folder)
    files = TensorFiles(folder)
    found = _canonical_keys(folder, files)
    post = config["model_type"] == names.MODEL_TYPE["post"]
    whole = model_of(folder, config, "post" if post else "pre", nsp=True)
    nsp = all(key in found for name in names.NSP_NAMES for key in names.their_names(whole, name))
    model = whole.model_copy(update={"nsp": nsp})
    table = names.name_map(model)
    notes = []
    if not any(key in found for name in names.HEAD_NAMES for key in table[name]):
        table = {name: keys for name, keys in table.items() if name not in names.HEAD_NAMES}
        notes.append(f"no MLM head, a fresh one is made with seed {FRESH_SEED}")
    _check_tensors(folder, model, table, files, found)
    notes += _left_out(folder, table, files, found)
    if notes:
        print(f"{folder}: {'; '.join(notes)}", file=sys.stderr)
    weights = _Weights(model, files, {name: tuple(found[key] for key in keys) for name, keys in table.items()})
    has_tokenizer = any((folder / name).is_file() for name in VOCABULARIES)
    return Imported(model, weights, folder if has_tokenizer else None)


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
        if given not in values and (given is not None or key == "model_type"):  # null stands for the default
            choices = " or ".join(json.dumps(value) for value in values)
            raise UserError(f"{path}: {key}: {json.dumps(given)} is not supported; use a model with {choices}")
    return config


def model_of(folder: Path, config: dict[str, Any], norm: str, nsp: bool) -> Model:
    path = folder / "config.json"
    given: dict[str, Any] = {"norm": norm, "nsp": nsp}
    for ours, theirs in names.CONFIG.items():
        value = config.get(theirs)
        given[ours] = names.CONFIG_DEFAULTS.get(theirs) if value is None else value
        if given[ours] is None:
            raise UserError(f"{path}: {theirs}: this key is required; add it")
    given["activation"] = names.ACTIVATIONS[given["activation"]]
    try:
        return Model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key = names.CONFIG.get(str(first["loc"][0]), "") if first["loc"] else "num_attention_heads"
        raise UserError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}; correct it") from None


def _canonical_keys(folder: Path, files: TensorFiles) -> dict[str, str]:
    """Present name -> name in the files."""
    found: dict[str, str] = {}
    for key in files.shapes:
        name = names.canonical(key)
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
    folder: Path, model: Model, table: Mapping[str, tuple[str, ...]], files: TensorFiles, found: Mapping[str, str]
) -> None:
    """Raises UserError for the first tensor that is missing, of another shape than config.json says, or not tied."""
    shapes = parameter_shapes(model)
    for name, keys in table.items():
        expected = names.part_shape(shapes[name], len(keys))
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
    folder: Path, table: Mapping[str, tuple[str, ...]], files: TensorFiles, found: Mapping[str, str]
) -> list[str]:
    """Notes on tensors that are not taken over. Raises UserError where the encoder itself would compute with one."""
    used = {key for keys in table.values() for key in keys} | set(names.TIED)
    rest = [key for key in found if key not in used]
    for key in rest:
        if key.startswith("bert.") and not key.startswith("bert.pooler."):
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
) -> None:
    """Write a folder that `AutoModelForMaskedLM.from_pretrained(out)` opens: config.json, model.safetensors, tokenizer.

    `read` gives the tensor of each parameter name. Shared layers are written once for each depth, and
    low-rank feed-forward matrices multiplied out; both are exact. The folder appears whole or not at all. Raises
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
    write_whole(out, force, lambda folder: _write_files(model, read, folder, tokenizer))


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


def _check_free(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out}: exists; give another --out, or --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UserError(f"{out}: exists and is not an exported model; --force replaces only those")


def _write_files(model: Model, read: Callable[[str], Tensor], folder: Path, tokenizer: Path | None) -> None:
    from safetensors.torch import save_file

    copy_tokenizer(tokenizer, folder, model.positions)
    config = {
        "architectures": [names.CLASS_PREFIX[model.norm] + ("ForPreTraining" if model.nsp else "ForMaskedLM")],
        "model_type": names.MODEL_TYPE[model.norm],
        **names.config_of(model),
        "pad_token_id": _pad_id(folder),
        "tie_word_embeddings": True,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(_their_tensors(model, read), folder / "model.safetensors", metadata={"format": "pt"})


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


def copy_tokenizer(tokenizer: Path | None, folder: Path, positions: int) -> None:
    """Put a tokenizer's files into the folder of an exported model, which reads `positions` tokens."""
    for name in TOKENIZER_FILES:
        if tokenizer is not None and (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, folder / name)
    _limit_tokenizer(folder / "tokenizer_config.json", positions)


def _limit_tokenizer(path: Path, positions: int) -> None:
    """The tokenizer truncates at what this model can read, whatever it was made for."""
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_max_length"] = positions
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pad_id(folder: Path) -> int:
    """Id of the padding token of the tokenizer in a folder; 0, as in the published vocabularies, if it has none."""
    try:
        if (folder / "tokenizer.json").is_file():
            added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
            return next((int(token["id"]) for token in added if token["content"] == "[PAD]"), 0)
        if (folder / "vocab.txt").is_file():
            return (folder / "vocab.txt").read_text(encoding="utf-8").splitlines().index("[PAD]")
    except (ValueError, KeyError, TypeError, AttributeError):
        return 0  # only fine-tuning reads it, and only to leave that row of the embedding alone
    return 0
