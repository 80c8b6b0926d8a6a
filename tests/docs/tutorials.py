"""The blocks of a tutorial, as its reader would paste them."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "docs/tutorials").glob("*.md"))
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_HEREDOC = re.compile(r"<<'EOF'\n.*?^EOF$", re.DOTALL | re.MULTILINE)


def script(page: Path) -> str:
    """All bash blocks of a page, one after the other; a block that fails ends them."""
    blocks = _BLOCK.findall(page.read_text(encoding="utf-8"))
    return "set -euo pipefail\n" + "\n".join(blocks)


def commands(page: Path, program: str) -> list[list[str]]:
    """The arguments of every call of `program` on a page, without what the shell makes of redirections."""
    lines = _HEREDOC.sub("", script(page)).replace("\\\n", " ").split("\n")
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]
    return [_plain(line[1:]) for line in words]


def environment() -> dict[str, str]:
    """As after `. .venv/bin/activate` in this checkout."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


def _plain(words: list[str]) -> list[str]:
    for position, word in enumerate(words):
        if word in (">", "&", "|", "||", "&&"):
            return words[:position]
    return words


def files(page: Path) -> dict[str, str]:
    """What a page has its reader write with `cat > NAME <<'EOF'`: name -> content."""
    return dict(re.findall(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF$", script(page), re.DOTALL | re.MULTILINE))
