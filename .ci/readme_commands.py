"""Print the README's marked commands, each ended by NUL: `.ci/run` runs what a newcomer would type."""

from __future__ import annotations

import re
import sys
from pathlib import Path

MARKED = re.compile(r"<!-- ci -->\s*```sh\n(.*?)```", re.DOTALL)

for command in MARKED.findall(Path(sys.argv[1]).read_text(encoding="utf-8")):
    sys.stdout.write(f"{command.strip()}\0")
