"""Prometheus, promtool and Alertmanager: those on the machine, or Debian's packages unpacked into a cache."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}
_ALSO_KNOWN_AS = {"prometheus-alertmanager": "alertmanager"}
# Debian's Alertmanager opens its template under an absolute path. In a copy that isn't installed, the same number of
# bytes say where it is from the folder of the package, which is why it has to be started there.
_INSTALLED_ASSETS = b"/usr/share/prometheus/alertmanager"
_UNPACKED_ASSETS = b"usr/share//prometheus/alertmanager"
_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "debian"


class MissingToolError(RuntimeError):
    """A program is neither installed nor to be had from Debian's packages."""


def find_tool(name: str, *, cache: Path = _CACHE) -> Path:
    """Path of "prometheus", "promtool" or "prometheus-alertmanager", to be started in the folder above its `usr`.

    What is not on the PATH is downloaded with apt, which checks its signature, and unpacked, not installed; neither
    needs rights.

    Raises:
        MissingToolError: it isn't there and apt can't get it.
    """
    installed = shutil.which(name) or shutil.which(_ALSO_KNOWN_AS.get(name, name))
    if installed:
        return Path(installed)
    package = _PACKAGES[name]
    unpacked = cache / package
    if not unpacked.is_dir():
        _unpack(package, unpacked)
    return unpacked / "usr" / "bin" / name


def _unpack(package: str, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch_name:
        scratch = Path(scratch_name)
        try:
            try:
                _run(["apt-get", "download", package], scratch)
            except subprocess.CalledProcessError:  # no package lists yet: fetch them into a place of our own
                lists = ["-o", f"Dir::State={scratch}/state", "-o", f"Dir::Cache={scratch}/cache"]
                for needed in ("state/lists/partial", "cache/archives/partial"):
                    (scratch / needed).mkdir(parents=True)
                _run(["apt-get", *lists, "update"], scratch)
                _run(["apt-get", *lists, "download", package], scratch)
            _run(["dpkg-deb", "-x", *map(str, scratch.glob("*.deb")), str(scratch / "unpacked")], scratch)
        except FileNotFoundError as error:
            raise MissingToolError(f"{package} is not installed, and there is no {error.filename} to get it") from None
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise MissingToolError(f"{package} is not installed, and {error.cmd[0]} failed: {last}") from None
        _relocate(scratch / "unpacked")
        if not folder.is_dir():  # another process may have been faster
            (scratch / "unpacked").rename(folder)


def _relocate(package: Path) -> None:
    program = package / "usr" / "bin" / "prometheus-alertmanager"
    if program.is_file():
        program.write_bytes(program.read_bytes().replace(_INSTALLED_ASSETS, _UNPACKED_ASSETS))


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
