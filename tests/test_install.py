"""The pins resolve as on a stranger's machine, with pip's own configuration; the wheel brings a working `mpm`."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent / "docker"))

from dockerfile import INSTRUCTIONS

ROOT = Path(__file__).resolve().parents[1]
# Read where they lie once installed.
DATA = """
import handlers, k8s.monitoring.prometheus, loadtest.page, model_store, mpm_ops
from pathlib import Path
from handlers.cli import DEMO
from loadtest.cli import LOCUSTFILE
files = [k8s.monitoring.prometheus.RULES, LOCUSTFILE]
files += [DEMO.with_name(name) for name in ("checkpoint.pth", "variant.yml", "classes.csv")]
files += [LOCUSTFILE.parent / name for name in ("page.html", "uplot/uPlot.iife.min.js")]
files += [Path(handlers.__file__).with_name("edge") / name for name in ("openapi.yaml", "static/index.html")]
files += [Path(package.__file__).with_name("py.typed") for package in (handlers, mpm_ops)]
files += [Path(mpm_ops.__file__).with_name("datasets") / f"{name}.csv" for name in ("ade20k", "cityscapes")]
print([file for file in files if not file.is_file()])
"""


def pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pip as if nobody had configured it."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    plain["PIP_CONFIG_FILE"] = os.devnull
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("extras", ["server,loadtest,dev", "triton", "kernels,tracing"])
def test_pins_resolve_with_pips_own_configuration(extras: str) -> None:
    if pip("--timeout=10", "--retries=0", "index", "versions", "pip").returncode:
        pytest.skip("no package index answers")
    done = pip("install", "--dry-run", "--quiet", "--ignore-installed", "-c", "constraints.txt", f".[{extras}]")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_wheel_brings_the_command(tmp_path: Path) -> None:
    """Built of what the image's build copies, and installed beside this environment's dependencies alone."""
    source = tmp_path / "source"
    source.mkdir()
    copied = [text.split()[:-1] for stage, name, text in INSTRUCTIONS if (stage, name) == ("wheel", "COPY")]
    for path in (ROOT / name for names in copied for name in names):
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    built = pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")

    fresh = tmp_path / "fresh"
    venv.create(fresh)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(fresh)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    installed = pip("--python", str(fresh), "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    assert installed.returncode == 0, installed.stderr

    def run(*command: str) -> str:
        plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    mpm = str(fresh / "bin" / "mpm")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert run(mpm, "--version").split()[-1] == project["version"]
    for name in ["serve", "segment", *project["entry-points"]["mpm.commands"]]:
        assert run(mpm, name, "--help").startswith(f"Usage: mpm {name}")
    assert "check-manifests" in run(mpm, "--help")
    assert run(mpm, "samples", "--out", "painted").count(".jpg") == 5
    assert run(mpm, "segment", "painted/street.jpg") == "masks/street.png\n"
    assert run(str(fresh / "bin" / "python"), "-c", DATA) == "[]\n"
