"""How much memory the control groups of this process leave it: a container's, a Slurm step's, a systemd unit's.

The limit may stand in any group from the process's own up to the root of what is mounted here, so all of them are
asked. Version 2 has one tree, version 1 one for each controller; both may be mounted at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOUNT, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def left_by_groups(mount: Path = MOUNT, membership: Path = MEMBERSHIP) -> int | None:
    """Bytes until the tightest limit; None where there is no limit. What cannot be read is left out."""
    left = [_left(limit, usage, stat) for limit, usage, stat in _files(mount, membership)]
    return min((size for size in left if size is not None), default=None)


def _files(mount: Path, membership: Path) -> Iterator[tuple[Path, Path, Path]]:
    """Limit, usage and statistics of every group above this process."""
    for controllers, group in _memberships(membership):
        if not controllers:
            root, limit, usage = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, usage = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Where the tree is mounted from a group down, as in a container, the outer part of the name leads nowhere.
        inner = PurePosixPath("/" if ".." in group else group).relative_to("/")
        for folder in (root / inner, *(root / part for part in inner.parents)):
            yield folder / limit, folder / usage, folder / "memory.stat"


def _memberships(path: Path) -> Iterator[tuple[str, str]]:
    """(controllers, group) of each line `id:controllers:group`; version 2 names no controllers."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if group.startswith("/"):
            yield controllers, group


def _left(limit: Path, usage: Path, stat: Path) -> int | None:
    """None without a limit ("max"), or where a file is missing."""
    try:
        return int(limit.read_text()) - int(usage.read_text()) + _droppable(stat)
    except (OSError, ValueError):
        return None


def _droppable(stat: Path) -> int:
    """File cache that counts as used and that the system drops before it refuses memory; 0 where unknown."""
    try:
        fields = dict(line.split(maxsplit=1) for line in stat.read_text().splitlines())
        return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))  # version 1: with inner groups
    except (OSError, ValueError):
        return 0
