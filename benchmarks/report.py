"""Writes tables of results/*.json into Markdown files, between `<!-- name -->` and `<!-- /name -->`.

python benchmarks/report.py
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness import RESULTS, ROOT
from harness.results import ended
from harness.sections import sections
from sana_edge.errors import InvalidInput
from sana_edge.system.atomic import write_bytes

FILES = (
    *("README.md", "benchmarks/README.md", "docs/benchmarks.md", "docs/gpu.md"),
    "sana_edge/models/sana-tiny/README.md",
)
SECTION = re.compile(r"(<!-- (?P<name>[a-z-]+) -->\n).*?(<!-- /(?P=name) -->)", re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the sections of the given Markdown files, or of the project's."""
    paths = _options(sys.argv[1:] if argv is None else argv).files or [ROOT / name for name in FILES]
    return ended(lambda: [write_bytes(p, rewritten(p, dict(sections(RESULTS))).encode()) for p in paths])


def rewritten(path: Path, tables: Mapping[str, str]) -> str:
    """A file's text with its sections as they should be.

    Raises:
        InvalidInput: a section that there is no table for.
    """

    def replaced(match: re.Match[str]) -> str:
        if match["name"] not in tables:
            known = f"choose from {', '.join(tables)}"
            raise InvalidInput(f"{path.name}: no results for the section {match['name']}", known)
        return f"{match[1]}{tables[match['name']]}\n{match[3]}"

    return SECTION.sub(replaced, path.read_text(encoding="utf-8"))


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="report.py", description="Write tables of results into Markdown.")
    parser.add_argument("files", nargs="*", type=Path, help=f"(default: {', '.join(FILES)})")
    return parser.parse_args(given)


if __name__ == "__main__":
    sys.exit(main())
