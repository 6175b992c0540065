"""Is every command of README.md one that was run? The commands that were run are the arguments.

Commands are the lines of its shell code blocks, without comments and prompts. Getting the source (`git clone`, `cd`)
is what every run begins with. A block that shows output, or a command that cannot be run here, is marked `text`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
PROMISED = {"make quickstart", "make test"}
NO_SHELL = {"python", "text", "toml", "ini", "json", "yaml", "diff"}
FENCE = re.compile(
    r"^(?P<fence>```+|~~~+)[ \t]*(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=fence)", re.MULTILINE | re.DOTALL
)


def commands_in(markdown: str) -> list[str]:
    """Return the commands of the shell code blocks, in order."""
    blocks = [match["body"] for match in FENCE.finditer(markdown) if match["language"].lower() not in NO_SHELL]
    lines = [line.removeprefix("$ ").split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines if not line.startswith("#") for part in line.split("&&")]
    return [part for part in parts if part and not part.startswith(("git clone ", "cd "))]


def main(ran: list[str]) -> int:
    """Print what differs and return the exit code."""
    commands = commands_in(README.read_text(encoding="utf-8"))
    problems = [f"README.md tells to run `{c}`, which CI does not run." for c in commands if c not in ran]
    problems += [f"README.md does not show `{c}`." for c in sorted(PROMISED.difference(commands))]
    print("\n".join(problems) or f"README.md: all of its {len(commands)} commands were run.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
