"""Programs that tests need and pip can't install: those on the machine, or Debian's packages unpacked into a cache."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "haproxy": "haproxy",
}
# Beyond what every Debian has; see `library_path`.
_LIBRARIES = {"haproxy": ("liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1")}
_CACHE = Path(__file__).resolve().parents[1] / ".cache" / "debian"


class MissingToolError(RuntimeError):
    """A program is neither installed nor to be had from Debian's packages."""


def find_tool(name: str, *, cache: Path = _CACHE) -> Path:
    """Path of "prometheus", "promtool" or "haproxy".

    What is not on the PATH is downloaded with apt, which checks its signature, and unpacked, not installed; neither
    needs rights.

    Raises:
        MissingToolError: it isn't there and apt can't get it.
    """
    installed = shutil.which(name)
    if installed:
        return Path(installed)
    package = _PACKAGES[name]
    unpacked = cache / package
    if not unpacked.is_dir():
        _unpack(package, unpacked)
    (program,) = unpacked.glob(f"usr/*bin/{name}")
    return program


def library_path(tool: Path) -> dict[str, str]:
    """Environment in which a program that is unpacked, not installed, finds its libraries; no harm to others."""
    return {"LD_LIBRARY_PATH": os.pathsep.join(map(str, sorted((tool.parents[1] / "lib").glob("*-linux-gnu"))))}


def _unpack(package: str, folder: Path) -> None:
    wanted = (package, *_LIBRARIES.get(package, ()))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        try:
            try:
                _run(["apt-get", "download", *wanted], scratch)
            except subprocess.CalledProcessError:  # no package lists yet: fetch them into a place of our own
                lists = ["-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache"]
                for needed in ("state/lists/partial", "cache/archives/partial"):
                    (scratch / needed).mkdir(parents=True)
                _run(["apt-get", *lists, "update"], scratch)
                _run(["apt-get", *lists, "download", *wanted], scratch)
            for archive in scratch.glob("*.deb"):
                _run(["dpkg-deb", "-x", str(archive), str(scratch / "unpacked")], scratch)
        except FileNotFoundError as error:
            raise MissingToolError(f"{package} is not installed, and there is no {error.filename} to get it") from None
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingToolError(f"{package} is not installed, and {error.cmd[0]} failed: {last}") from None
        if not folder.is_dir():  # another process may have been faster
            (scratch / "unpacked").rename(folder)


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
