"""docker/Dockerfile as data."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docker"
DOCKERFILE = FOLDER / "Dockerfile"
TARGETS = ("torchserve", "triton")
METRICS_PORT = "8090"
TRITON_METRICS_PORT = "8002"


def instructions() -> Iterator[tuple[str, str, str]]:
    """Stage, instruction and its arguments, continued lines joined; the stage before the first FROM is empty."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    stage = ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        name, arguments = line.split(maxsplit=1)
        if name == "FROM":
            stage = arguments.split(" AS ")[1]
        yield stage, name, arguments


INSTRUCTIONS = list(instructions())
STAGES = [arguments for _, name, arguments in INSTRUCTIONS if name == "FROM"]


def last(stage: str, name: str) -> str:
    return [arguments for at, instruction, arguments in INSTRUCTIONS if (at, instruction) == (stage, name)][-1]


def command_of(stage: str) -> list[str]:
    command: list[str] = json.loads(last(stage, "CMD"))
    return command
