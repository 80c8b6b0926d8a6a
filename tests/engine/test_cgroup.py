"""Memory that control groups leave, on made-up trees of both versions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from growth_ds.engine import memory
from growth_ds.engine.cgroup import left_by_groups

GB = 1 << 30
V1_NONE = 9223372036854771712
"""What version 1 says where there is no limit."""


@pytest.fixture
def tree(tmp_path):
    """Write groups of either version; ask."""
    mount, membership = tmp_path / "cgroup", tmp_path / "self"

    def group(path, limit, usage, stat=None, v1=False):
        folder = mount / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(f"{limit}\n")
        (folder / ("memory.usage_in_bytes" if v1 else "memory.current")).write_text(f"{usage}\n")
        if stat is not None:
            (folder / "memory.stat").write_text(stat)

    def ask(lines):
        membership.write_text(lines)
        return left_by_groups(mount, membership)

    return SimpleNamespace(group=group, ask=ask, mount=mount, membership=membership)


def test_a_container_has_its_limit_at_the_root(tree):
    tree.group(".", 8 * GB, 3 * GB)
    assert tree.ask("0::/\n") == 5 * GB
    tree.membership.unlink()
    assert left_by_groups(tree.mount, tree.membership) == 5 * GB


def test_a_slurm_step_has_its_limit_inside(tree):
    tree.group("system.slice/slurm/job_1/step_0", "max", GB)
    tree.group("system.slice/slurm/job_1", 4 * GB, 3 * GB)
    tree.group("system.slice/slurm", 64 * GB, 3 * GB)
    assert tree.ask("0::/system.slice/slurm/job_1/step_0\n") == GB
    assert tree.ask("0::/system.slice/slurm\n") == 61 * GB
    assert tree.ask("0::/elsewhere\n") is None


def test_file_cache_is_free(tree):
    tree.group("a", 4 * GB, 4 * GB, f"anon 5\ninactive_file {2 * GB}\nactive_file 7\n")
    assert tree.ask("0::/a\n") == 2 * GB


def test_version_1(tree):
    tree.group("memory/docker/x", 4 * GB, 3 * GB, f"inactive_file 5\ntotal_inactive_file {GB}\n", v1=True)
    tree.group("memory", V1_NONE, 9 * GB, v1=True)
    tree.group("cpu/docker/x", 5, 5, v1=True)
    assert tree.ask("4:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n1:name=systemd:/\n0::/\n") == 2 * GB


def test_version_1_seen_from_inside_a_container(tree):
    """The name is the host's, the tree is mounted from the group down."""
    tree.group("memory", 2 * GB, GB, v1=True)
    assert tree.ask("4:memory:/docker/x\n") == GB
    assert tree.ask("4:memory:/../../docker/x\n") == GB


def test_what_cannot_be_read_is_left_out(tree):
    tree.group("a", "many", GB)
    tree.group("a/b", 4 * GB, GB, "inactive_file\n\n?")
    (tree.mount / "a/c").mkdir()
    assert tree.ask("0::/a/b\nnonsense\n\n7\n") == 3 * GB
    assert tree.ask("0::/a/c\n") is None


@pytest.mark.parametrize(("left", "available"), [(None, 10), (4, 4), (-3, 0), (99, 10)])
def test_the_tighter_of_machine_and_group_counts(monkeypatch, left, available):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    monkeypatch.setattr(memory, "left_by_groups", lambda: left)
    assert memory.available_memory() == available
