"""Whatever the README tells to type or to set exists: commands with their options, targets, files, fields, headers.

Nothing is run. A command's own parser reads its arguments, and stops there.
"""

import argparse
import ast
import importlib
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from handlers import cli
from handlers.config import ServingConfig
from handlers.observe.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
OURS = [ROOT / name for name in ("README.md", "handlers/README.md", "mpm_ops/README.md")]
README = "\n".join(file.read_text(encoding="utf-8") for file in OURS)
PACKAGES = ("handlers", "loadtest", "model_store", "mpm_ops")
FOLDERS = (*PACKAGES, "docker", "k8s", "tests")

BLOCKS = re.findall(r"^ *```(\w+)\n(.*?)^ *```", README, re.MULTILINE | re.DOTALL)
SHELL = "\n".join(text for kind, text in BLOCKS if kind == "sh").replace("\\\n", " ")
PROSE = re.sub(r"^ *```.*?^ *```", "", README, flags=re.MULTILINE | re.DOTALL)
SPANS = list(dict.fromkeys(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", PROSE)))
SPACED = "\n".join([SHELL, *SPANS])
# These tell of other projects' commands and settings too; of ours, how to run and where to look.
MANUALS = [*(ROOT / name / "README.md" for name in ("docker", "k8s", "loadtest")), ROOT / "k8s" / "fleet.md"]
MANUAL_COMMANDS = "\n".join(file.read_text(encoding="utf-8") for file in MANUALS).replace("\\\n", " ")


class _ParsedError(Exception):
    """The arguments were accepted."""


@pytest.fixture
def _only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: list[str]) -> None:
        parse(parser, *arguments)
        raise _ParsedError

    def stop_command(command: click.Command, context: click.Context) -> Any:
        if isinstance(command, click.Group):
            return None  # its command is parsed next
        if command.name == "bench":
            return invoke(command, context)  # which hands the arguments on
        raise _ParsedError

    invoke = click.Command.invoke
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(click.Command, "invoke", stop_command)


def found(*patterns: str, text: str = SPACED) -> list[str]:
    """What is matched anywhere, once each; a pattern that finds nothing has rotted itself."""
    names = []
    for pattern in patterns:
        names += (hits := re.findall(pattern, text, re.MULTILINE))
        assert hits, f"nothing in README.md looks like {pattern}"
    return list(dict.fromkeys(names))


def spans(pattern: str) -> list[str]:
    return found(rf"^(?:{pattern})$", text="\n".join(SPANS))


@cache
def strings(folders: tuple[str, ...] = PACKAGES) -> str:
    """All that code says in literals, docstrings aside, one a line and in lower case."""
    said: list[str] = []
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file != Path(__file__):
                tree = ast.parse(file.read_text(encoding="utf-8"))
                told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
                literals = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in told)
                said += [node.value.lower() for node in literals if isinstance(node.value, str)]
    return "\n".join(said)


@cache
def settings() -> str:
    """What is not Python: images, manifests and scripts."""
    files = (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*")) if file.is_file())
    return "\n".join(
        f.read_text(encoding="utf-8", errors="ignore") for f in files if f.suffix in ("", ".sh", ".yaml", ".yml")
    )


def read_mpm(line: str) -> None:
    """Let the command `mpm` parse the rest; without options, see that it has such a command.

    Raises:
        SystemExit, click.UsageError: the arguments are refused.
    """
    arguments = shlex.split(re.split(r"[|;`]|&&", line)[0], comments=True)
    if not any(argument.startswith("-") or "/" in argument for argument in arguments):
        arguments.append("--help")
    try:
        assert cli.commands.main(arguments, "mpm", standalone_mode=False) == 0, "only its help is not stopped"
    except _ParsedError:
        return
    except SystemExit as stopped:  # the help of what is handed on
        if stopped.code != 0:
            raise


@pytest.mark.usefixtures("_only_parsing")
@pytest.mark.parametrize("line", found(r"(?:^|[\s/])mpm (.+)", text=f"{SPACED}\n{MANUAL_COMMANDS}"))
def test_mpm_takes_its_options(line: str) -> None:
    read_mpm(line)


@pytest.mark.usefixtures("_only_parsing")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("everything", "No such command 'everything'"),
        ("serve --prot 80", "No such option '--prot'"),
        ("serve --port 80000", "80000 is not in the range"),
        ("build --target nginx --out x", "'nginx' is not one of 'torchserve', 'triton'"),
        ("loadtest capacity --rate 500", "Missing argument"),
        ("loadtest nothing --rate 500", "No such command 'nothing'"),
        ("bench everything", "invalid choice: 'everything'"),
        ("bench codec --checkpoint x", "the following arguments are required: --images"),
        ("bench model --images X --most many  # comment", "invalid int value: 'many'"),
        ("bench model --images X | tee log", None),
        ("health", None),
    ],
)
def test_what_is_wrong_of_mpm_is_noticed(line: str, expected: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    if expected is None:
        read_mpm(line)
        return
    with pytest.raises((click.UsageError, SystemExit)) as raised:
        read_mpm(line)
    told = raised.value.format_message() if isinstance(raised.value, click.UsageError) else ""
    assert expected in f"{told} {capsys.readouterr().err}"


def read_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the module that `python -m` names parse the rest; without options, see that it has such a command.

    Raises:
        ModuleNotFoundError, AttributeError: there is nothing to run.
        SystemExit: the arguments are refused; its code is 2.
    """
    name, *arguments = shlex.split(re.split(r"[|;`]|&&", line)[0], comments=True)
    module = importlib.import_module(name)
    if not hasattr(module, "main"):
        module = importlib.import_module(f"{name}.__main__")
    if not any(argument.startswith("-") or "://" in argument for argument in arguments):
        arguments.append("--help")
    monkeypatch.setattr("sys.argv", [name, *arguments])
    try:
        if module.main() == 0 and "--help" in arguments:
            return
    except _ParsedError:
        return
    except SystemExit as stopped:
        if stopped.code != 0:
            raise
        return
    raise AssertionError(f"{name} parses no arguments")


@pytest.mark.usefixtures("_only_parsing")
@pytest.mark.parametrize("line", found(r"python -m (?!pip|venv|pytest)(.+)", text=f"{SPACED}\n{MANUAL_COMMANDS}"))
def test_commands_take_their_options(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_command(line, monkeypatch)


@pytest.mark.usefixtures("_only_parsing")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("handlers.nothing --port 1", "No module named 'handlers.nothing'"),
        ("handlers.engine.grouping --port 1", "No module named 'handlers.engine.grouping.__main__'"),
        ("handlers.bench.gpu --wait 3", "unrecognized arguments: --wait"),
        ("mpm_ops.bench gpu", None),
    ],
)
def test_a_command_that_is_wrong_is_noticed(
    line: str, expected: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if expected is None:
        read_command(line, monkeypatch)
        return
    with pytest.raises((ModuleNotFoundError, SystemExit)) as raised:
        read_command(line, monkeypatch)
    assert expected in f"{raised.value} {capsys.readouterr().err}"


@pytest.mark.parametrize("option", found(r"(?<!\S)--[a-z-]+", text="\n".join(SPANS)))
def test_options_named_alone_belong_to_a_command(option: str) -> None:
    assert option == "--help" or option in strings().splitlines()


@pytest.mark.parametrize("target", found(r"\bmake ([a-z-]+)"))
def test_targets_are_in_the_makefile(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("variables", found(r"((?:[A-Z]\w*=\S+ )+)make"))
def test_variables_of_make_are_in_the_makefile(variables: str) -> None:
    for variable in variables.split():
        name = variable.partition("=")[0]
        assert re.search(rf"^{name} \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("path", found(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w./-]*"))
def test_files_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("file", [*OURS, *MANUALS], ids=lambda file: file.parent.name)
def test_links_lead_somewhere(file: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", file.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = file.parent / path
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


@pytest.mark.parametrize("row", found(r"^\| `\w+/` \| .*$", text=PROSE))
def test_files_of_a_folder_exist(row: str) -> None:
    folder, *inside = re.findall(r"`([^`]+)`", row)
    for path in inside:
        assert (ROOT / folder / path).exists(), path


@pytest.mark.parametrize("setting", spans(r"[a-z_]+: \S+"))
def test_settings_are_accepted(setting: str) -> None:
    ServingConfig.from_mapping(yaml.safe_load(setting))


@pytest.mark.parametrize("name", spans(r"[a-z]+(?:_[a-z]+)+"))
def test_names_are_those_of_fields_metrics_or_packages(name: str) -> None:
    metrics = {family.name for family in Metrics("readme", grid=1, info={}).registry.collect()}
    assert name in ServingConfig.__dataclass_fields__ or name in metrics or name in FOLDERS


@pytest.mark.parametrize(
    "header",
    found(r"\b[Xx]-[\w-]+", r"\btriton-grpc-\w[\w-]+") + found(r"^\| `([A-Z][\w-]+)` \| [^|]+\|$", text=PROSE),
)
def test_headers_are_those_of_the_code(header: str) -> None:
    assert header.lower() in strings()


@pytest.mark.parametrize("name", spans(r"[A-Z]+(?:_[A-Z]+)+(?:=\w+)?"))
def test_variables_and_outputs_are_those_of_the_code(name: str) -> None:
    for part in name.split("="):
        assert part.lower() in strings(FOLDERS).splitlines() or re.search(rf"\b{part}\b", settings())


@pytest.mark.parametrize("extra", found(r"'\.\[(\w+)\]'"))
def test_extras_can_be_installed(extra: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]


@pytest.mark.parametrize("text", [text for kind, text in BLOCKS if kind == "python"])
def test_names_of_the_library_can_be_imported(text: str) -> None:
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert imports
    for node in imports:
        module = importlib.import_module(str(node.module))
        assert [name.name for name in node.names if not hasattr(module, name.name)] == []
