"""Images and containers of the tests' own: their store in one folder, a stand-in for the public base, builds and runs.

No base image is pulled. The stand-in is this machine's Debian with its Python, under the name that the Dockerfile asks
for, so the Dockerfile is built as it is; that the public base behaves alike is not shown.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

from tests.cluster.runs import ROOT

NEEDED = ("buildah", "podman", "runc", "mmdebstrap")
STAND_IN = ("ca-certificates", "python3", "python3-pip", "python3-venv")
PIP_KEYS = ("index-url", "extra-index-url", "find-links", "cert", "trusted-host")
CACHE = Path("/var/lib/containers")
"""Where buildah and podman remember layers of registries, whatever folder their images are in."""


def unable() -> str:
    """Why no image can be built here; empty if one can."""
    if os.geteuid() != 0:
        return "the image tests build and run containers in network namespaces: they need root"
    if not Path("/etc/debian_version").exists():
        return "the image tests make their base image of this machine's Debian, and this is none"
    missing = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (tests/cluster/packages.sh images)" if missing else ""


def pip_settings(listed: str) -> dict[str, str]:
    """Where pip looks for packages, from `pip config list`; what the environment says counts more than files."""
    found = {}
    lines = [line for line in listed.splitlines() if re.match(r"\S+\.[\w-]+='", line)]
    for line in sorted(lines, key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        if (key := name.rpartition(".")[2]) in PIP_KEYS:
            found[key] = " ".join(str(ast.literal_eval(value)).split())
    return found


def local_folders(settings: dict[str, str]) -> list[str]:
    """What pip's settings name on this machine: files and folders; of an index its parent, which its links lead to."""
    found = set()
    for word in " ".join(settings.values()).split():
        if word.startswith("/"):
            found.add(word)
        elif word.startswith("file:"):
            found.add(str(Path(urlparse(word).path).parent))
    return sorted(found)


class Engine:
    """buildah and podman on a store of their own. Use as a context manager: nothing is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache_was_here = CACHE.exists()
        store = ["--root", str(folder / "graph"), "--runroot", str(folder / "run"), "--storage-driver", "overlay"]
        self._buildah = ["buildah", *store]
        # runc and cgroupfs: also without systemd, and where control groups are of both versions.
        self._podman = ["podman", *store, "--tmpdir", str(folder / "tmp"), "--events-backend=none"]
        self._podman += ["--cgroup-manager=cgroupfs", "--runtime=runc"]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for command in ([*self._podman, "rm", "--all", "--force", "--time=0"], [*self._buildah, "rm", "--all"]):
                subprocess.run(command, capture_output=True, timeout=120)
        finally:
            self._unmount()
            shutil.rmtree(self.folder, ignore_errors=True)
            if not self.cache_was_here:
                shutil.rmtree(CACHE, ignore_errors=True)

    def mounts(self) -> list[str]:
        """What is mounted below the engine's folder, the innermost first."""
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [place for line in reversed(lines) if (place := line.split()[1]).startswith(f"{self.folder}/")]

    def _unmount(self) -> None:
        for place in self.mounts():
            subprocess.run(["umount", "--lazy", place], capture_output=True, timeout=20)

    def buildah(self, *words: str, limit_s: float = 120) -> str:
        return _said([*self._buildah, *words], limit_s)

    def podman(self, *words: str, limit_s: float = 120) -> str:
        return _said([*self._podman, *words], limit_s)

    def stand_in(self, *names: str) -> None:
        """An image of this machine's Debian, with Python, under each of the names."""
        tree = self.folder / "base.tar"
        self.folder.mkdir(exist_ok=True)
        codename = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.MULTILINE)
        assert codename is not None
        packages = f"--include={','.join(STAND_IN)}"
        _said(["mmdebstrap", "--quiet", "--variant=minbase", packages, codename[1], str(tree)], 300)
        container = self.buildah("from", "scratch").strip()
        self.buildah("add", "--quiet", container, str(tree), "/")
        self.buildah("config", "--cmd", "python3", container)
        self.buildah("commit", "--quiet", "--rm", container, names[0])
        for name in names[1:]:
            self.buildah("tag", names[0], name)
        tree.unlink()

    def build(self, dockerfile: Path, tag: str, *options: str, limit_s: float = 1800) -> str:
        """Build a Dockerfile as it is, with pip's settings of this machine in the build alone; the image's id."""
        command = ["bud", "--pull-never", "--isolation=chroot", "--format=docker", "--tag", tag]
        command += ["--file", str(dockerfile), *self._as_here(), *options, str(ROOT)]
        self.buildah(*command, limit_s=limit_s)
        return self.podman("image", "inspect", "--format", "{{.Id}}", tag).strip()

    def _as_here(self) -> list[str]:
        """Mounts that let pip in a build look where it looks here: an index of one's own, wheels, authorities."""
        listed = _said([sys.executable, "-m", "pip", "config", "list"], 60)
        settings = pip_settings(listed)
        lines = "".join(f"{key} = {value}\n" for key, value in settings.items())
        (self.folder / "pip.conf").write_text(f"[global]\n{lines}")
        mounts = [f"{self.folder}/pip.conf:/etc/pip.conf", *(f"{each}:{each}" for each in local_folders(settings))]
        return [f"--volume={mount}:ro" for mount in mounts]

    def size(self, name: str) -> int:
        """Bytes of all layers of an image."""
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", name))

    def run(self, image: str, *words: str, options: tuple[str, ...] = (), limit_s: float = 120) -> str:
        """What a container says; `words` go to its entry point."""
        return _said(self.command(image, *words, options=options), limit_s)

    def command(self, image: str, *words: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command line that runs a container with its user's rights taken away as docker does."""
        command = [*self._podman, "run", "--rm", "--pull=never", "--no-healthcheck"]
        # The engine would raise them, which not every root may.
        command += [f"--ulimit={name}={number}:{number}" for name, number in (("nofile", 4096), ("nproc", 4096))]
        if not any(each.startswith("--network") for each in options):
            command.append("--network=none")
        return [*command, *options, image, *words]


def _said(command: list[str], limit_s: float) -> str:
    """Standard output; AssertionError with everything if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout[-6000:]}{done.stderr[-6000:]}"
    return done.stdout
