"""The embedded corpus: size, repetition, split, and that nothing is imported to get it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from growth_ds.data import pycorpus
from growth_ds.data.corpus import Document
from growth_ds.data.ngrams import normalised_words, overlap, repeated_share
from growth_ds.errors import UserError


@pytest.fixture(scope="module")
def split() -> tuple[list[Document], list[Document]]:
    return pycorpus.python_split()


def size(documents: list[Document]) -> int:
    return sum(len(d.text.encode()) for d in documents)


def test_it_is_large_and_bounded(split: tuple[list[Document], list[Document]]) -> None:
    train, valid = split
    assert 8_000_000 <= size(train) + size(valid) <= pycorpus.MAX_BYTES
    assert 0.01 < size(valid) / size(train) < 0.1
    assert len(valid) > 50


def test_validation_text_does_not_occur_in_training_text(split: tuple[list[Document], list[Document]]) -> None:
    train, valid = split
    assert overlap([d.text for d in valid], [d.text for d in train]) <= pycorpus.MAX_OVERLAP
    assert not {d.id for d in train} & {d.id for d in valid}


def test_paragraphs_are_prose_and_none_comes_twice(split: tuple[list[Document], list[Document]]) -> None:
    train, valid = split
    documents = [*train, *valid]
    assert [d.id for d in train] == sorted(d.id for d in train)
    paragraphs = [p for d in documents for p in d.text.split("\n")]
    keys = [" ".join(normalised_words(p)) for p in paragraphs]
    assert len(set(keys)) == len(keys)
    assert repeated_share(paragraphs).mean() < 0.05
    assert all(len(p.split()) >= 6 for p in paragraphs)
    assert not any(mark in p for p in paragraphs for mark in (">>>", "[MASK]", "```", "\t"))
    words = [word for p in paragraphs[::50] for word in normalised_words(p)]
    assert 0.04 < sum(word == "the" for word in words) / len(words) < 0.12


def test_documents_do_not_depend_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pycorpus._source_files()[::40]
    monkeypatch.setattr(pycorpus, "_source_files", lambda packages: files)
    assert pycorpus.python_documents(workers=1) == pycorpus.python_documents(workers=2)


def test_without_packages_the_standard_library_alone_is_read() -> None:
    names = {name for name, _ in pycorpus._source_files("")}
    assert "argparse" in names
    assert not any(name.startswith(("numpy.", "torch.")) for name in names)


def test_the_digest_is_cheap_and_follows_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    first = pycorpus.python_digest()
    assert first == pycorpus.python_digest()
    files = pycorpus._source_files()
    monkeypatch.setattr(pycorpus, "_source_files", lambda: files[1:])
    assert pycorpus.python_digest() != first


def test_no_package_is_imported_to_read_it() -> None:
    code = (
        "import sys; from growth_ds.data import pycorpus; pycorpus._read_batch(pycorpus._source_files()[::400]);"
        "print([m for m in ('torch', 'transformers', 'sympy', 'matplotlib', 'sentencepiece') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_docstrings_are_found_where_documentation_lives() -> None:
    source = '''
"""Module text."""
HELP = """help
    text"""
PLAIN = "no line feed"
add_newdoc("numpy", "x", """new
    doc""")
class C:
    """Class text."""
    def f(self):
        """Method text."""
        inner = """
        local data"""
        def g():
            """Inner text."""
async def h():
    """Async text."""
if True:
    def i():
        """Conditional text."""
'''
    found = [" ".join(text.split()) for text in pycorpus._docstrings(ast.parse(source).body)]
    for expected in ["help text", "new doc", "Class text.", "Method text.", "Inner text.", "Async text."]:
        assert found.count(expected) == 1
    assert "local data" not in found
    assert {"Module text.", "Conditional text."} <= set(found)


def test_repeats_within_and_between_modules_are_dropped() -> None:
    long = " ".join(f"w{i}" for i in range(30))
    modules = {
        "b": ["Shared words, here.", long + " and an ending"],
        "a": ["shared words here", long, "only in a"],
    }
    assert pycorpus._without_repeats(modules) == [Document("a", f"shared words here\n{long}\nonly in a")]


def test_broken_and_missing_sources_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def broken(:")
    (tmp_path / "b.py").write_bytes(b"\x00\xff")
    (tmp_path / "c.rst").write_text("The words of this file are kept as they are.")
    files = [("a", str(tmp_path / "a.py")), ("b", str(tmp_path / "b.py")), ("n", str(tmp_path / "none.py"))]
    assert pycorpus._read_batch([*files, ("c", str(tmp_path / "c.rst"))]) == [
        *[(name, []) for name in ("a", "b", "n")],
        ("c", ["The words of this file are kept as they are."]),
    ]


def test_an_installation_without_documentation_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pycorpus, "_source_files", lambda packages: [])
    with pytest.raises(UserError, match="almost no documentation"):
        pycorpus.python_documents(workers=1)


def test_the_bound_thins_out_whole_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pycorpus, "MAX_BYTES", 150_000)
    documents = [Document(f"m{i:03}", "x" * 1000) for i in range(300)]
    kept = pycorpus._bounded(documents)
    assert len(kept) == 150
    assert kept == sorted(kept, key=lambda d: d.id)
