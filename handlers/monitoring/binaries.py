"""Programs that are not Python's: those on the machine, or Debian's packages unpacked into a cache."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

_PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "haproxy": "haproxy",
}
# Beyond what every Debian has; see `library_path`.
_LIBRARIES = {"haproxy": ("liblua5.3-0", "libopentracing-c-wrapper0", "libopentracing1")}
_ALSO_KNOWN_AS = {"prometheus-alertmanager": "alertmanager"}
# Debian's Alertmanager opens its template under an absolute path. In a copy that isn't installed, the same number of
# bytes say where it is from the folder of the package, which is why it has to be started there.
_INSTALLED_ASSETS = b"/usr/share/prometheus/alertmanager"
_UNPACKED_ASSETS = b"usr/share//prometheus/alertmanager"
_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "debian"


class MissingToolError(RuntimeError):
    """A program is neither installed nor to be had from Debian's packages."""


def find_tool(name: str, *, cache: Path = _CACHE) -> Path:
    """Path of "prometheus", "promtool", "prometheus-alertmanager" or "haproxy", to be started above its `usr`.

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
        _relocate(scratch / "unpacked")
        if not folder.is_dir():  # another process may have been faster
            (scratch / "unpacked").rename(folder)


def _relocate(package: Path) -> None:
    program = package / "usr" / "bin" / "prometheus-alertmanager"
    if program.is_file():
        program.write_bytes(program.read_bytes().replace(_INSTALLED_ASSETS, _UNPACKED_ASSETS))


def _run(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
