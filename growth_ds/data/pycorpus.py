"""The corpus that needs no download: the English of the documentation in installed Python packages.

Sources are read as text and parsed with `ast`; no module is imported. One document is one module.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from growth_ds.data.corpus import Document
from growth_ds.data.hashing import text_uniform
from growth_ds.data.ngrams import gram_hashes, normalised_words, repeated_share, shared_share
from growth_ds.data.parallel import default_workers, ordered_map
from growth_ds.data.prose import prose_paragraphs
from growth_ds.errors import UserError

# What the project's own requirements bring along. A fixed list keeps the corpus bounded and free of what else is
# installed; a package that is missing is left out.
PACKAGES = """
    PIL absl click contourpy dateutil deepspeed einops filelock fontTools fsspec google grpc hjson httpx
    huggingface_hub jinja2 kiwisolver markdown markdown_it markupsafe matplotlib megatron mpl_toolkits mpmath msgpack
    networkx numpy packaging pip pkg_resources psutil pydantic pydantic_core pyparsing regex rich
    safetensors sentencepiece setuptools sympy tensorboard tokenizers torch torchgen tqdm transformers typer
    typing_extensions werkzeug yaml zstandard
"""
MAX_BYTES = 12_000_000
VALID_FRACTION = 0.03
MAX_OVERLAP = 0.01
_MIN_BYTES = 100_000
_SKIPPED_FOLDERS = frozenset(
    ["test", "tests", "testing", "idle_test", "site-packages", "dist-packages", "__pycache__", "_vendor"]
)
# Much code with little text, and the same text in each: half of transformers.
_SKIPPED_FILES = ("modeling_", "modular_", "convert_")
_NEAR_DUPLICATE = 0.5  # a paragraph with more of its 13-grams seen before than this is a template filled in again
_BATCH_FILES = 64
_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_BLOCKS = ("body", "handlers", "orelse", "finalbody")  # where a compound statement keeps statements
_DOCUMENTATION = (".rst", ".md", ".txt")
_NOT_PROSE = ("license", "licence", "copying", "notice", "requirements", "sources", "top_level", "entry_points")


def python_documents(workers: int | None = None, packages: str = PACKAGES) -> list[Document]:
    """The corpus, one document a module, sorted by module name, without repeated or near-repeated paragraphs.

    `text` has one paragraph a line. `packages`: names with blanks between, read beside the standard library. Raises
    UserError where almost no documentation is installed.
    """
    files = _source_files(packages)
    batches = [files[i : i + _BATCH_FILES] for i in range(0, len(files), _BATCH_FILES)]
    modules: dict[str, list[str]] = {}
    for batch in ordered_map(_read_batch, batches, workers or default_workers()):
        modules.update(batch)
    return _bounded(_without_repeats(modules))


def python_split(workers: int | None = None) -> tuple[list[Document], list[Document]]:
    """The corpus as (train, valid), split by module; at most 1 % of valid's 13-grams occur in train."""
    documents = python_documents(workers)
    is_valid = [text_uniform(d.id, seed=0) < VALID_FRACTION for d in documents]
    train = [d for d, v in zip(documents, is_valid, strict=True) if not v]
    valid = [d for d, v in zip(documents, is_valid, strict=True) if v]
    return train, _disjoint(valid, train)


def python_digest() -> str:
    """A digest of the files the corpus would be read from (names and sizes), without reading them."""
    digest = hashlib.sha256(f"python-corpus-1 {platform.python_version()}".encode())
    for name, path in _source_files():
        digest.update(f"\n{name} {os.path.getsize(path)}".encode())
    return digest.hexdigest()


def _source_files(packages: str = PACKAGES) -> list[tuple[str, str]]:
    """(module name, path) of every file read, sorted by name."""
    paths = sysconfig.get_paths()
    found = dict(_walk(Path(paths["stdlib"]), Path(paths["stdlib"])))
    for site in {paths["purelib"], paths["platlib"]}:
        for package in packages.split():
            found.update(_walk(Path(site, package), Path(site)))
    return sorted(found.items())


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, str]]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(("config-", ".")))
        for name in names:
            stem, suffix = os.path.splitext(name)
            documentation = suffix in _DOCUMENTATION and not stem.lower().startswith(_NOT_PROSE)
            if (suffix == ".py" and not name.startswith(_SKIPPED_FILES)) or documentation:
                parts = Path(parent).relative_to(root).parts + ((stem,) if suffix == ".py" else (name,))
                yield ".".join(parts), os.path.join(parent, name)


def _read_batch(files: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    return [(name, [p for text in _texts(path) for p in prose_paragraphs(text)]) for name, path in files]


def _texts(path: str) -> Iterable[str]:
    try:
        source = Path(path).read_bytes()
        if not path.endswith(".py"):
            return [source.decode("utf-8", "replace")]
        if b'"""' not in source and b"'''" not in source:
            return []  # parsing is most of the time, and documentation is long enough for long quotes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            return list(_docstrings(ast.parse(source).body))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # templates and deliberately broken files are no loss


def _docstrings(body: list[ast.stmt]) -> Iterator[str]:
    """Docstrings, and documentation kept in other multi-line strings outside functions (`add_newdoc` and the like)."""
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(statement, clean=False) or ""
            yield from _docstrings([inner for inner in statement.body if isinstance(inner, _DEFINITIONS)])
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            yield str(statement.value.value)
        elif blocks := [getattr(statement, name) for name in _BLOCKS if getattr(statement, name, None)]:
            for block in blocks:
                yield from _docstrings(block)
        else:
            yield from (text for text in _strings(statement) if "\n" in text.strip())


def _strings(statement: ast.stmt) -> Iterator[str]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _without_repeats(modules: dict[str, list[str]]) -> list[Document]:
    """Documents of the paragraphs whose words were not seen before, exactly or nearly."""
    seen: set[str] = set()
    names: list[str] = []
    paragraphs: list[str] = []
    for name in sorted(modules):
        for paragraph in modules[name]:
            key = " ".join(normalised_words(paragraph))
            if key not in seen:
                seen.add(key)
                names.append(name)
                paragraphs.append(paragraph)
    fresh = repeated_share(paragraphs) <= _NEAR_DUPLICATE
    return _grouped([(n, p) for n, p, keep in zip(names, paragraphs, fresh, strict=True) if keep])


def _grouped(paragraphs: Iterable[tuple[str, str]]) -> list[Document]:
    by_name: dict[str, list[str]] = {}
    for name, paragraph in paragraphs:
        by_name.setdefault(name, []).append(paragraph)
    return [Document(name, "\n".join(lines)) for name, lines in sorted(by_name.items())]


def _bounded(documents: list[Document]) -> list[Document]:
    """At most MAX_BYTES of documents, thinned by a hash of the name."""
    sizes = np.array([len(d.text.encode()) for d in documents], np.int64)
    if sizes.sum() < _MIN_BYTES:
        raise UserError(
            "corpus: the installed Python packages hold almost no documentation; name your own text files as inputs"
        )
    order = sorted(range(len(documents)), key=lambda i: text_uniform(documents[i].id, seed=1))
    kept = np.zeros(len(documents), bool)
    kept[order] = np.cumsum(sizes[order]) <= MAX_BYTES
    return [d for d, keep in zip(documents, kept, strict=True) if keep]


def _disjoint(valid: list[Document], train: list[Document]) -> list[Document]:
    """`valid` without the paragraphs that share a 13-gram with `train`.

    Sequences across two paragraphs may still be shared, rarely; a reader of whole documents would find them, so the
    documents that hold too many are given up.
    """
    known, _ = gram_hashes([d.text for d in train])
    paragraphs = [(d.id, p) for d in valid for p in d.text.split("\n")]
    shares = shared_share([p for _, p in paragraphs], known)
    valid = _grouped(pair for pair, share in zip(paragraphs, shares, strict=True) if share == 0)
    whole = shared_share([d.text for d in valid], known)
    return [d for d, share in zip(valid, whole, strict=True) if share <= MAX_OVERLAP]
