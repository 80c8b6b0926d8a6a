"""Which container image this process runs in, as the image itself, the engine that runs it, or a person tells it.

No image holds its own id, which is a digest over it, and few engines tell it inside. So a digest of what is installed
is written into each image while it is built (`python -m growth_ds.image REVISION`); it is the same after the image was
turned into enroot's or apptainer's, which the engine's id is not.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from growth_ds.files import sha256

SEAL = Path("/etc/growth-ds-image")
"""Written by the Dockerfiles: "contents=sha256:..." and "revision=...", a line each."""
CONTAINERENV = Path("/run/.containerenv")
"""Written by podman and buildah; podman leaves it empty unless the container is privileged."""
PACKAGES = Path("/var/lib/dpkg/status")
"""Names and versions of Debian's packages."""


def image(
    environ: Mapping[str, str] | None = None, seal: Path = SEAL, containerenv: Path = CONTAINERENV
) -> dict[str, str]:
    """What is known of the image; empty outside of one. Each key only where somebody tells it:

    contents   "sha256:...", of what is installed in it; the Dockerfiles here write it
    revision   the commit it was built from, if the build was told
    id         "sha256:...", the engine's: podman's and buildah's own word, or GROWTH_DS_IMAGE_ID
    name       file or name: apptainer's, podman's and buildah's own word, or GROWTH_DS_IMAGE in an image of ours
    """
    env = os.environ if environ is None else environ
    ours, engine = _pairs(seal), _pairs(containerenv)
    name = env.get("APPTAINER_CONTAINER") or env.get("SINGULARITY_CONTAINER") or engine.get("image")
    if ours:  # a shell that exports GROWTH_DS_IMAGE for its jobs is in no image
        name = name or env.get("GROWTH_DS_IMAGE")
    found = {
        "contents": ours.get("contents"),
        "revision": ours.get("revision"),
        "id": _with_kind(engine.get("imageid") or env.get("GROWTH_DS_IMAGE_ID", "")),
        "name": name,
    }
    return {key: value for key, value in found.items() if value}


def contents(folders: Iterable[Path], files: Iterable[Path] = ()) -> str:
    """ "sha256:..." of all files below the folders and of the given ones: names and bytes, links as links.

    Byte code is left out (it has times in it), and so is what is missing.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(each for each in folder.rglob("*") if each.suffix != ".pyc"):
            if path.is_symlink():
                digest.update(f"{path.relative_to(folder)} -> {os.readlink(path)}\n".encode())
            elif path.is_file():
                digest.update(f"{path.relative_to(folder)} {sha256(path)}\n".encode())
    for path in files:
        if path.is_file():
            digest.update(f"{path} {sha256(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _pairs(path: Path) -> dict[str, str]:
    """The lines key=value or key="value" of a file; none if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    split = (line.partition("=") for line in lines)
    return {key.strip(): value.strip().strip('"') for key, _, value in split if value}


def _with_kind(identity: str) -> str:
    """Docker writes "sha256:..." where podman writes the digits alone."""
    digits = set(identity) <= set("0123456789abcdef") and len(identity) == 64
    return f"sha256:{identity}" if digits else identity


def main(revision: str = "unknown") -> None:
    """Print the seal of the image that is being built: this environment, its interpreter, Debian's list of packages."""
    print(f"contents={contents([Path(sys.prefix)], [Path(sys.executable).resolve(), PACKAGES])}")
    if revision != "unknown":
        print(f"revision={revision}")


if __name__ == "__main__":
    main(*sys.argv[1:])
