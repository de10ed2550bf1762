"""Write the tables of the documentation that come from the code; with --check, only say whether they are there.

A table stands between `<!-- settings: OPERATION -->` and `<!-- end -->` in a file of docs/.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from surgery.emission.markdown import code, table, text
from surgery.operations import find_operation
from surgery.settings_table import settings_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"(<!-- settings: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(operation: str) -> str:
    """The settings of an operation, as `surgery operations NAME` lists them."""
    rows = [
        (code(setting.name), code(setting.type), code(setting.default), text(setting.description))
        for setting in settings_table(find_operation(operation).settings)
    ]
    return "\n".join(table(("setting", "type", "default", "meaning"), rows))


def main() -> int:
    """Returns 1 where --check finds a table that is not what the code says."""
    stale = []
    for file in sorted(DOCS.glob("*.md")):
        old = file.read_text(encoding="utf-8")
        new = BLOCK.sub(lambda found: f"{found[1]}{rendered(found[2])}\n{found[3]}", old)
        if new != old:
            stale.append(file.name)
            if "--check" not in sys.argv[1:]:
                file.write_text(new, encoding="utf-8")
    print(f"{'stale' if '--check' in sys.argv[1:] else 'written'}: {', '.join(stale) or 'none'}")
    return int(bool(stale) and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
