"""What can be told of the images without building them."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile import DOCKERFILE, FOLDER, INSTRUCTIONS, METRICS_PORT, ROOT, STAGES, TARGETS, command_of, last

from handlers.cli import main
from handlers.config import ServingConfig
from handlers.launch import health, processes
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton


def is_ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that matches the path or a folder above it decides."""
    parts = Path(path).parts
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!").rstrip("/")
        patterns = (pattern, pattern.removeprefix("**/"), f"*/{pattern.removeprefix('**/')}")
        tried = patterns if pattern.startswith("**/") else patterns[:1]
        if any(fnmatch(each, one) and (pattern != "*" or "/" not in each) for each in above for one in tried):
            ignored = not line.startswith("!")
    return ignored


class TestLint:
    @pytest.fixture
    def hadolint(self) -> str:
        found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
        if not found:
            pytest.skip("hadolint is not installed; it comes with the extra `dev`")
        return found

    def test_finds_nothing(self, hadolint: str) -> None:
        done = subprocess.run([hadolint, "--no-color", str(DOCKERFILE)], capture_output=True, text=True)
        assert done.stdout + done.stderr == ""
        assert done.returncode == 0

    def test_would_find_something(self, hadolint: str, tmp_path: Path) -> None:
        worse = tmp_path / "Dockerfile"
        worse.write_text(DOCKERFILE.read_text().replace("FROM ${BASE_IMAGE} AS tools", "FROM python:latest AS tools"))
        done = subprocess.run([hadolint, "--no-color", str(worse)], capture_output=True, text=True)
        assert "DL3007" in done.stdout
        assert done.returncode


class TestContext:
    SOURCES = sorted(
        {
            source
            for _, name, arguments in INSTRUCTIONS
            if name == "COPY" and "--from=" not in arguments
            for source in arguments.split()[:-1]
        }
    )

    @pytest.mark.parametrize("source", SOURCES)
    def test_what_is_copied_is_there_and_reaches_the_build(self, source: str) -> None:
        path = ROOT / source
        assert path.exists()
        files = [path] if path.is_file() else [*path.rglob("*.py"), *path.glob("demo/*.pth")]
        assert files
        for file in files:
            assert not is_ignored(str(file.relative_to(ROOT))), file

    @pytest.mark.parametrize("path", [".git/config", "build/x", "tests/conftest.py", "handlers/__pycache__/a.pyc"])
    def test_what_no_image_needs_stays_out(self, path: str) -> None:
        assert is_ignored(path)

    def test_copies_from_stages_that_exist(self) -> None:
        stages = {arguments.split(" AS ")[1] for arguments in STAGES}
        used = {source for _, name, arguments in INSTRUCTIONS for source in re.findall(r"--from=(\S+)", arguments)}
        assert used
        assert used <= stages


class TestStages:
    def test_come_from_the_base_or_from_each_other(self) -> None:
        names = {arguments.split(" AS ")[1] for arguments in STAGES}
        for arguments in STAGES:
            base = arguments.split(" AS ")[0]
            assert base == "${BASE_IMAGE}" or base in names

    def test_base_has_a_version(self) -> None:
        (base,) = (arguments for _, name, arguments in INSTRUCTIONS if name == "ARG" and arguments.startswith("BASE"))
        assert re.fullmatch(r"BASE_IMAGE=python:3\.\d+-slim-\w+", base)

    def test_end_as_a_user_without_rights(self) -> None:
        for target in (*TARGETS, "loadtest"):
            assert f"runtime AS {target}" in STAGES
        assert [(stage, user) for stage, name, user in INSTRUCTIONS if name == "USER"] == [("runtime", "10001:10001")]

    def test_compilers_only_with_cuda(self) -> None:
        (installing,) = (arguments for _, name, arguments in INSTRUCTIONS if name == "RUN" and "gcc" in arguments)
        assert installing.startswith('if [ "${VARIANT}" = cuda ]; then')

    def test_no_entrypoint(self) -> None:
        assert "ENTRYPOINT" not in {name for _, name, _ in INSTRUCTIONS}

    def test_version_is_the_projects(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for target in TARGETS:
            assert f"VERSION={project['version']}" in [
                arguments for stage, name, arguments in INSTRUCTIONS if (stage, name) == (target, "ARG")
            ]


class TestPip:
    def test_says_what_to_give_it_when_it_fails(self, tmp_path: Path) -> None:
        """The command itself, with a pip that finds nothing."""
        (tmp_path / "pins.txt").write_text("timm==1\ntorch==2.13.0+cpu\ntorchvision==1\n")
        command = (
            last("project-environment", "RUN").replace("python3 -m venv", ": ").replace("/tools/bin/pip", "false")
        )
        done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True)
        assert done.returncode == 1
        assert b"found no torch==2.13.0+cpu: PIP_EXTRA_INDEX_URL: expected" in done.stderr
        assert b"got ''" in done.stderr
        assert subprocess.run(["sh", "-c", command.replace("false", "true")], cwd=tmp_path).returncode == 0

    def test_make_hands_the_index_over(self, tmp_path: Path) -> None:
        if not shutil.which("make"):
            pytest.skip("make is not installed")
        command = ["make", "-C", str(ROOT), "--dry-run", "image", "BUILDER=docker"]
        for environment, handed in (({"PIP_EXTRA_INDEX_URL": "somewhere"}, True), ({}, False)):
            done = subprocess.run(command, env={"PATH": "/usr/bin:/bin"} | environment, capture_output=True, text=True)
            assert ("--build-arg PIP_EXTRA_INDEX_URL=somewhere" in done.stdout) is handed
            assert ("PIP_EXTRA_INDEX_URL" in done.stdout) is handed


class TestCommands:
    @pytest.mark.parametrize(("target", "server"), [("torchserve", TorchServe), ("triton", Triton)])
    def test_the_command_takes_them(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, server: type
    ) -> None:
        starts: list[Any] = []
        fronts: list[Any] = []

        def run(start: Any, *, front: Any, **_: Any) -> None:
            starts.append(start)
            fronts.append(front)

        monkeypatch.setattr(processes, "run_in_foreground", run)
        command = command_of(target)
        assert command[:3] == ["mpm", "serve", "/models"]
        assert main(["serve", str(tmp_path), *command[3:]]) == 0
        (start,) = starts
        assert start.func is server
        assert start.keywords["host"] == "0.0.0.0"
        assert fronts == [None]

    @pytest.mark.parametrize("target", TARGETS)
    def test_health_check_is_an_inference(self, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
        asked: list[str] = []
        told: list[str] = []

        def check(url: str, *, timeout_seconds: float, metrics_url: str) -> None:
            asked.append(url)
            told.append(metrics_url)

        monkeypatch.setattr(health, "check_model", check)
        shell, option, line = json.loads(last(target, "HEALTHCHECK").partition(" CMD ")[2])
        assert (shell, option) == ("sh", "-c")
        # As the shell reads it, with another model than the image's own.
        done = subprocess.run(
            [shell, option, line.replace("exec", "printf '%s\\n'")],
            env={"MODEL": "roads", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        words = done.stdout.split()
        assert words[:2] == ["mpm", "health"]
        assert last(target, "ENV") == "MODEL=segmenter"
        assert main(words[1:]) == 0
        command = command_of(target)
        port = command[command.index("--port") + 1]
        assert asked == [
            {
                "torchserve": f"http://127.0.0.1:{port}/predictions/roads",
                "triton": f"http://127.0.0.1:{port}/v2/models/roads",
            }[target]
        ]
        assert told == [f"http://127.0.0.1:{METRICS_PORT}/metrics"]

    @pytest.mark.parametrize("target", TARGETS)
    def test_ports_are_said(self, target: str) -> None:
        command = command_of(target)
        listening = {command[i + 1] for i, word in enumerate(command) if word.endswith("port")}
        assert set(last(target, "EXPOSE").split()) == listening | {METRICS_PORT}

    def test_demo_model_shows_its_metrics_outside(self) -> None:
        config = ServingConfig.from_mapping(yaml.safe_load((FOLDER / "serving.yml").read_text()))
        assert config.metrics_host == "0.0.0.0"
        assert f"--metrics-port {METRICS_PORT}" in (FOLDER / "finish.sh").read_text()


class TestPins:
    @staticmethod
    def write(tmp_path: Path, *options: str) -> tuple[list[str], dict[str, str]]:
        """Requirements, and pins by name, as a build makes them."""
        command = [sys.executable, str(FOLDER / "requirements.py"), "--out", str(tmp_path), *options]
        subprocess.run(command, check=True)
        pins = (tmp_path / "pins.txt").read_text().split()
        return (tmp_path / "requirements.txt").read_text().split(), {canonical(pin): pin for pin in pins}

    def test_load_comes_without_the_network(self, tmp_path: Path) -> None:
        (said,) = (one for at, name, one in INSTRUCTIONS if (at, name) == ("requirements", "RUN"))
        options = shlex.split(said.split("requirements.py")[-1].split("--out")[0])
        wanted, pins = self.write(tmp_path, *options)
        assert {"locust", "numpy"} <= {canonical(one) for one in wanted} <= pins.keys()
        assert "torch" not in {canonical(one) for one in wanted}

    @pytest.mark.parametrize("extra", ["server", "triton"])
    def test_every_requirement_is_pinned(self, tmp_path: Path, extra: str) -> None:
        wanted, pins = self.write(tmp_path, "--variant", "cpu", "--extra", extra)
        assert {"torch", "numba", "openvino"} <= {canonical(one) for one in wanted}
        assert {canonical(one) for one in wanted} <= pins.keys()
        assert pins["torch"] == "torch==2.13.0+cpu"

    def test_cuda_brings_its_own(self, tmp_path: Path) -> None:
        wanted, pins = self.write(tmp_path, "--variant", "cuda", "--extra", "server")
        constraints = (ROOT / "constraints.txt").read_text()
        assert "triton" in wanted
        assert pins["torch"].startswith("torch===")
        assert "nvidia-cudnn-cu13" in pins
        assert pins["torch"] not in constraints.splitlines()
        assert pins["numpy"] in constraints

    @pytest.mark.parametrize(
        "file", ["tools.txt", "constraints-cpu.txt", "constraints-cuda.txt", "../constraints.txt"]
    )
    def test_one_version_each(self, file: str) -> None:
        lines = [line for line in (FOLDER / file).read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+={2,3}[\w.+]+", line) for line in lines)
        assert len({canonical(line) for line in lines}) == len(lines)


class TestMake:
    @pytest.mark.parametrize("builder", ["docker", "podman", "buildah"])
    @pytest.mark.parametrize(("variant", "tag"), [("cpu", "latest"), ("cuda", "latest-cuda")])
    def test_image(self, builder: str, variant: str, tag: str) -> None:
        """By the names that the compose files use."""
        if not shutil.which("make"):
            pytest.skip("make is not installed")
        command = [
            "make",
            "--no-print-directory",
            "--dry-run",
            "image",
            f"BUILDER={builder}",
            "SERVER=triton",
            f"VARIANT={variant}",
        ]
        said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        assert said.startswith(f"{builder} build ")
        assert ("--format docker" in said) == (builder != "docker")  # the other format has no health check
        assert f"--build-arg VARIANT={variant} " in said
        assert f"--tag mpm-segmenter-triton:{tag} ." in said
        assert "--file docker/Dockerfile --target triton " in said


def canonical(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
