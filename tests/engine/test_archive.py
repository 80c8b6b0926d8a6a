"""Files of torch.save that claim much: refused in one line, at once, in a process with little memory."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from growth_ds.engine.ds_files import load
from tests.checkpoints import TINY, random_states
from tests.deepspeed_folders import write_zero3
from tests.small_child import Child

WAYS = """
from growth_ds.convert import convert
from growth_ds.engine.ds_files import load
from growth_ds.errors import UserError
from growth_ds.interop.tensor_files import TensorFiles

WAYS = {"load": load, "weights": TensorFiles}
WAYS["convert"] = lambda path: convert(
    path, path.with_name("out"), to="universal", model=None, zero=2, force=False, tokenizer=None
)
"""


@pytest.fixture(scope="module")
def child():
    """Opens a file or folder in one of three ways; gives what was said ("" for nothing)."""
    with Child(WAYS, grown=50 << 20) as process:

        def ask(way: str, path: Path) -> str:
            [answer] = process.ask(path, way)
            assert "\n" not in answer
            return answer

        yield ask


def packed(data: bytes, method: int = zipfile.ZIP_STORED, at: int = 0, storages: int = 1) -> tuple[bytes, int]:
    """An archive of a pickle and storages of 12 bytes, and where its directory is; `at`: bytes before it."""
    parts = {"x/data.pkl": data, "x/version": b"3\n"} | {f"x/data/{key}": b"\0" * 12 for key in range(storages)}
    buffer = io.BytesIO(b"\0" * at)
    buffer.seek(at)
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in parts.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
        directory = archive.start_dir
    return buffer.getvalue()[at:], directory - at


def pickle_of(held: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


def long(value: int) -> bytes:
    return b"\x8a\x05" + value.to_bytes(5, "little")


def expanded(path: Path, **options: bool) -> None:
    torch.save({"a": torch.zeros(1).expand(10**10)}, path, **options)


def expanded_legacy(path: Path) -> None:
    expanded(path, _use_new_zipfile_serialization=False)


def in_an_attribute(path: Path) -> None:
    held = torch.nn.Module().state_dict()
    held._metadata = torch.zeros(1).expand(10**10)  # type: ignore[attr-defined]
    torch.save(held, path)


def legacy_storage_of_40_gb(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"K\x03Nt") == 1
    path.write_bytes(data.replace(b"K\x03Nt", long(10**10) + b"Nt"))


def storages_that_overlap(path: Path) -> None:
    """Torch cuts each off at the end of the file, and no earlier."""
    data = pickle_of([torch.zeros(1) for _ in range(10)])
    assert data.count(b"K\x01tq") == 10
    path.write_bytes(packed(data.replace(b"K\x01tq", b"K\xfatq"), storages=10)[0])


def deflated(path: Path) -> None:
    path.write_bytes(packed(b"\x80\x02X" + struct.pack("<I", 100 << 20) + b"a" * (100 << 20) + b".", 8)[0])


def deflated_behind_another_directory(path: Path) -> None:
    """zipfile finds the directory by where it ends and sees stored parts, torch by where it is said to start."""
    evil, start = packed(b"\x80\x02X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b".", 8)
    inner, _ = packed(b"\x80\x02N.", at=start - packed(b"\x80\x02N.")[1])
    whole = bytearray(evil[:-22] + inner)
    whole[-6:-2] = struct.pack("<I", start)
    path.write_bytes(whole)
    with zipfile.ZipFile(path) as archive:
        assert {part.compress_type for part in archive.infolist()} == {0}
    assert len(torch.load(path, weights_only=True)) == 10**6


def bytes_of_a_number(path: Path) -> None:
    path.write_bytes(packed(b"\x80\x02cbuiltins\nbytearray\n" + long(10**10) + b"\x85R.")[0])


def doubled_40_times(path: Path) -> None:
    call = b"c_codecs\nencode\n"
    start = call * 41 + b"X\1\0\0\0aX\6\0\0\0latin1\x86R"
    path.write_bytes(packed(b"\x80\x02" + start + b"X\3\0\0\0hex\x86R" * 40 + b".")[0])


def doubled_legacy(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    bomb = b"\x80\x02cbuiltins\nbytearray\n" + long(10**10) + b"\x85R."
    path.write_bytes(data.replace(b"\x80\x02}", bomb + b"\x80\x02}", 1))


def sparse(path: Path) -> None:
    torch.save({"a": torch.sparse_coo_tensor([[5]], [1.0], (10**10,), check_invariants=True)}, path)


def meta(path: Path) -> None:
    torch.save({"a": torch.empty(10**10, device="meta")}, path)


CLAIMS = [
    (expanded, "a tensor of 10000000000 elements lies in 4 bytes"),
    (expanded_legacy, "a tensor of 10000000000 elements lies in 4 bytes"),
    (in_an_attribute, "a tensor of 10000000000 elements lies in 4 bytes"),
    (legacy_storage_of_40_gb, ""),
    (storages_that_overlap, "its tensors claim"),
    (deflated, "its part 'x/data.pkl' is compressed"),
    (deflated_behind_another_directory, "its directory is not at its end"),
    (bytes_of_a_number, "it asks for more than tensors"),
    (doubled_40_times, "it asks for more than tensors"),
    (doubled_legacy, "it asks for more than tensors"),
    (sparse, "is sparse"),
    (meta, "without data"),
]


@pytest.mark.parametrize(("write", "message"), CLAIMS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_file_claims_costs_nothing(tmp_path, child, write, message):
    path = tmp_path / "pytorch_model.bin"
    write(path)
    assert path.stat().st_size < 1 << 20
    said = [child("weights", tmp_path), child("load", path)]
    assert all(line.startswith(str(path)) for line in said)
    assert message in said[0]
    if "legacy" not in write.__name__:  # DeepSpeed's files are archives
        assert message in said[1]


@pytest.mark.parametrize("kind", ["rigid", "universal"])
def test_folders_of_deepspeed(tmp_path, child, kind):
    tag = write_zero3(tmp_path / "source", random_states(TINY))
    assert child("convert", tmp_path / "source") == ""
    folder, file = tmp_path / "source", tag / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    if kind == "universal":
        folder = (tmp_path / "out").rename(tmp_path / "universal")
        file = folder / "global_step7/zero/head.bias/exp_avg.pt"
    else:
        (tmp_path / "out").rename(tmp_path / "universal")
    held = torch.load(file)
    if kind == "universal":
        held["param"] = torch.zeros(1).expand(10**10)
    else:
        held["optimizer_state_dict"]["fp32_flat_groups"][0] = torch.zeros(1).expand(10**10)
    torch.save(held, file)
    assert child("convert", folder).startswith(f"{file}: damaged")
    assert not (tmp_path / "out").exists()


def test_what_torch_writes_is_opened(tmp_path):
    """Views, tied and empty tensors, a buffer that is expanded by nothing; also zipped without zip64."""
    flat = torch.arange(10.0)
    held = {"view": flat[2:4], "tied": flat, "empty": torch.zeros(0, 3), "row": torch.arange(4).expand(1, -1)}
    torch.save(held, tmp_path / "a.pt")
    assert all(torch.equal(tensor, held[key]) for key, tensor in load(tmp_path / "a.pt").items())
    (tmp_path / "b.pt").write_bytes(packed(pickle_of({"a": torch.ones(3)}))[0])
    assert torch.equal(load(tmp_path / "b.pt")["a"], torch.zeros(3))
