"""Draw a report again.

python -m loadtest.report REPORT.json|- [--out REPORT.html]

`-` is an output of `python -m loadtest --print-json`, such as a log of Kubernetes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .page import render


def _read(path: Path) -> dict[str, Any]:
    if path != Path("-"):
        text = path.read_text(encoding="utf-8")
    else:
        text = ([line for line in sys.stdin if line.startswith("{")] or [""])[-1]
    try:
        summary = json.loads(text)
    except json.JSONDecodeError:
        summary = None
    if not isinstance(summary, dict) or "series" not in summary:
        raise ValueError(f"{path}: expected the JSON of a run")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.report", description="Draw a report again.")
    parser.add_argument("report", type=Path, help="JSON of a run, or - for an output that ends with it")
    parser.add_argument("--out", type=Path, help="HTML (beside the JSON)")
    arguments = parser.parse_args()
    try:
        summary = _read(arguments.report)
        piped = arguments.report == Path("-")
        out = arguments.out or (Path("report.html") if piped else arguments.report.with_suffix(".html"))
        out.write_text(render(summary), encoding="utf-8")
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
