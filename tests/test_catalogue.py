"""Every error that a user can cause has a code, and every code is met by somebody who uses the command line."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from growth_ds import catalogue, cli
from growth_ds.catalogue import AREAS, CATALOGUE, code_of, explain, page
from growth_ds.checkpoint.manifest import text_of
from growth_ds.errors import Unreadable, UserError
from growth_ds.lock import FolderLock
from tests.cli import growth_ds
from tests.test_bad_input import home, refused  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    # code -> command line after `growth-ds`; a file that is made before, as `name=content`
    "GDS-U01": ("plan good.yaml --fitt", ""),
    "GDS-O01": ("import hf --out ckpt", 'hf/config.json={"model_type":"bert"}'),
    "GDS-C01": ("plan b.yaml", "b.yaml=[1]"),
    "GDS-C02": ("plan good.yaml --set sed=1", ""),
    "GDS-C03": ("plan good.yaml --set seed", ""),
    "GDS-C04": ("train good.yaml --ranks 2 --set stages.0.batch.global=3", ""),
    "GDS-D01": ("prepare bad.jsonl --out out", "bad.jsonl={"),
    "GDS-D02": ("prepare good.txt --out out --tokenizer v.txt", "v.txt=a\nb"),
    "GDS-D03": ("train good.yaml --ranks 2 --set data.store=nowhere", ""),
    "GDS-K01": ("export absent --out out", ""),
    "GDS-K03": ("report store", ""),
    "GDS-G01": ("grow ckpt --recipe tile --to m.yaml --out out", "m.yaml=hidden: 6"),
    "GDS-G02": ("grow ckpt --recipe nowhere.py --times 2 --out out", ""),
    "GDS-G03": ("grow ckpt --recipe ligo --to deep.yaml --out out", ""),
    "GDS-E02": ("train good.yaml --ranks 2 --set engine.precision=fp16", ""),
    "GDS-H01": ("launch --hostfile absent -- train good.yaml", ""),
    "GDS-I01": ("import absent --out out", ""),
    "GDS-I02": ("convert store --out out", ""),
    "GDS-T01": ("evaluate ckpt --task nowhere", ""),
    "GDS-S01": ("compare configs/suite/s.yaml --seeds 99 --out out", ""),
    "GDS-R01": ("logs good.yaml", ""),
}
ELSEWHERE = {"GDS-O02", "GDS-K02", "GDS-K04", "GDS-E01"}
"""What no plain command line meets: the tests below."""


@pytest.mark.parametrize(("code", "line", "file"), [(code, *row) for code, row in ROWS.items()], ids=list(ROWS))
def test_a_line_ends_with_its_code(refused, code, line, file):  # noqa: F811
    name, _, content = file.partition("=")
    Path("good.txt").write_text("A river.\n\nStones.\n")
    if name:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    assert refused(*line.split()).endswith(f" [{code}]")


def test_a_checkpoint_of_another_version(refused):  # noqa: F811
    manifest = json.loads(Path("ckpt/manifest.json").read_text())
    Path("ckpt/manifest.json").write_text(text_of({**manifest, "format": 99}))
    assert refused("inspect", "ckpt").endswith(" [GDS-K02]")


def test_ranks_that_contradict_each_other(refused, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("train", "good.yaml").endswith(" [GDS-E01]")


def test_a_folder_that_cannot_be_locked(tmp_path):
    with pytest.raises(UserError) as caught, FolderLock(tmp_path / "absent"):
        pass
    assert code_of(caught.value) == "GDS-K04"


def test_a_file_that_is_another_users(monkeypatch, capsys):
    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied", "secret.yaml")

    monkeypatch.setattr(cli, "app", denied)
    result = growth_ds(monkeypatch, capsys, "plan", "secret.yaml")
    assert (result.code, result.err.split()[0]) == (2, "secret.yaml:")
    assert result.err.endswith(" [GDS-O02]\n")


def test_every_code_is_met():
    assert set(ROWS) | ELSEWHERE == set(CATALOGUE)


def test_the_page_is_the_catalogue():
    assert (ROOT / "docs/errors.md").read_text(encoding="utf-8") == page() + "\n"


def sources() -> Iterator[tuple[str, str]]:
    """(module, text) of the whole package."""
    for path in sorted((ROOT / "growth_ds").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8")


def test_every_module_that_refuses_has_an_area():
    raising = {name for name, text in sources() if re.search(r"\b(UserError|Unreadable)\(", text)}
    without = {name for name in raising - {"growth_ds.errors"} if not any(name.startswith(area) for area in AREAS)}
    # They hand on an error of another rank, or are never the last to speak: their errors give their own code.
    assert without <= {"growth_ds.catalogue"}


def test_every_area_and_every_given_code_is_in_the_catalogue():
    modules = {name for name, _ in sources()}
    assert set(AREAS) <= modules
    given = {code for _, text in sources() for code in strings(text) if re.fullmatch(r"GDS-[A-Z]\d\d", code)}
    assert given == set(CATALOGUE)
    assert set(AREAS.values()) <= set(CATALOGUE)


def strings(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_a_code_that_is_given_goes_over_that_of_the_module():
    assert code_of(UserError("a line")) == catalogue.USAGE  # made outside of the package
    assert code_of(UserError("a line", "GDS-D01")) == "GDS-D01"
    assert code_of(Unreadable("a line")) == "GDS-K02"


def rewritten(first: Exception) -> UserError:
    try:
        raise first
    except Exception as error:
        return UserError(f"where: {error}")


def test_an_error_that_says_more_of_the_place_keeps_its_code():
    assert code_of(rewritten(UserError("a", "GDS-D01"))) == "GDS-D01"
    assert code_of(rewritten(Unreadable("a"))) == "GDS-K02"
    assert code_of(rewritten(ValueError("a"))) == "GDS-U01"


def test_a_growth_that_cannot_be_has_one_code_offline_and_in_a_run(refused):  # noqa: F811
    Path("mine.py").write_text(
        "from growth_ds.errors import UserError\nfrom growth_ds.growth.recipe import recipe\n"
        "@recipe('mine', axes=('layers',))\ndef mine(ask):\n    raise UserError('not so many')\n"
    )
    for recipe in ("mine.py", "ffn-share"):
        line = refused("grow", "ckpt", "--recipe", recipe, "--to", "deep.yaml", "--out", "out")
        assert line.endswith(" [GDS-G01]"), line
        line = refused("plan", "good.yaml", "--set", f"stages.1.grow.recipe={recipe}")
        assert line.endswith(" [GDS-G01]"), line


def test_doctor_explains_a_code(monkeypatch, capsys, refused):  # noqa: F811
    result = growth_ds(monkeypatch, capsys, "doctor", "--explain", "[gds-c02]")
    assert result.code == 0
    assert result.out.strip() == explain("GDS-C02")
    assert refused("doctor", "--explain", "C99").startswith("--explain: 'C99' is no code; there are GDS-U01, ")
