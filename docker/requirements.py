"""Write requirements.txt and pins.txt for pip from pyproject.toml, constraints.txt and what a variant pins otherwise.

python docker/requirements.py --variant cpu|cuda [--extra NAME] [--only PACKAGE] --out DIR
"""

import argparse
import tomllib
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_EXTRAS = {"cpu": [], "cuda": ["kernels"]}  # of every image of the variant


def requirements(project: Path, extras: list[str], only: list[str]) -> list[str]:
    """What the project, or no more than `only` of it, and some of its extras depend on."""
    described = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    optional = described["optional-dependencies"]
    return sorted({*(only or described["dependencies"]), *(one for extra in extras for one in optional[extra])})


def pins(constraints: Path, variant: Path) -> list[str]:
    """Lines of both files; where both pin a package, the variant's."""
    return sorted((_pins(constraints) | _pins(variant)).values())


def _pins(path: Path) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return {line.partition("=")[0].strip().lower().replace("_", "-"): line for line in lines if line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=_EXTRAS, required=True)
    parser.add_argument("--extra", action="append", default=[], help="of pyproject.toml, any number")
    parser.add_argument("--only", action="append", default=[], help="instead of what the whole project needs")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    root = _HERE.parent
    wanted = requirements(root / "pyproject.toml", [*arguments.extra, *_EXTRAS[arguments.variant]], arguments.only)
    pinned = pins(root / "constraints.txt", _HERE / f"constraints-{arguments.variant}.txt")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "requirements.txt").write_text("\n".join(wanted) + "\n")
    (arguments.out / "pins.txt").write_text("\n".join(pinned) + "\n")


if __name__ == "__main__":
    main()
