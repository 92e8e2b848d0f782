"""Images for tests, where no base image can be pulled: Debian's packages as the base, pip as this machine has it.

    python tests/docker/image_building.py torchserve triton loadtest

Makes localhost/mpm-segmenter-torchserve:test and so on in the local storage of buildah and podman. Programs that are
missing are installed with apt where that is allowed.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[2]
BASE = "localhost/mpm-base:test"
TARGETS = ("torchserve", "triton", "loadtest")

_PROGRAMS = ("buildah", "podman", "runc", "mmdebstrap")  # packages of these names bring them
_RELEASE = "bookworm"
_BASE_PACKAGES = "python3,python3-venv,libpython3.11,ca-certificates"
_SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")


class CannotBuildError(RuntimeError):
    """What building needs isn't there; the message says what."""


def image_name(target: str) -> str:
    return f"localhost/mpm-segmenter-{target}:test"


def install_programs() -> None:
    """Install what is missing.

    Raises:
        CannotBuildError: this is not Linux with apt, or not root.
    """
    missing = [program for program in _PROGRAMS if not shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")]
    if os.geteuid() != 0:
        raise CannotBuildError("containers are built and run as root here")
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise CannotBuildError(f"{', '.join(missing)} not installed, and there is no apt-get to get it")
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CannotBuildError(f"{', '.join(missing)} not installed, and apt-get failed: {last}")


def build_base() -> None:
    """Make the stand-in base from Debian's packages, unless it is there."""
    if _exists(BASE):
        return
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        archive = scratch / "base.tar"
        sources = [str(path) for path in Path("/etc/apt/sources.list.d").glob("debian.sources")]
        _run(["mmdebstrap", "--variant=minbase", f"--include={_BASE_PACKAGES}", _RELEASE, str(archive), *sources])
        (scratch / "Dockerfile").write_text('FROM scratch\nADD base.tar /\nCMD ["python3"]\n')
        _run(["buildah", "bud", "--isolation", "chroot", "--format", "docker", "--tag", BASE, str(scratch)])


def build_image(target: str, *options: str) -> str:
    """Build a target of docker/Dockerfile on the stand-in base; returns the image's name.

    Args:
        target: "torchserve" or "triton".
        options: more of buildah.

    Raises:
        CannotBuildError: pip finds no build of torch for a CPU.
        subprocess.CalledProcessError: the build failed.
    """
    build_base()
    with _pip_as_here() as mounts:
        command = [
            "buildah",
            "bud",
            "--isolation",
            "chroot",
            "--pull-never",
            "--network",
            "host",
            "--format",
            "docker",
        ]
        command += ["--layers", "--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", "PIP_NO_CACHE_DIR=0"]
        command += [argument for mount in mounts for argument in ("--volume", mount)]
        command += ["--target", target, "--tag", image_name(target), "--file", str(ROOT / "docker" / "Dockerfile")]
        try:
            _run([*command, *options, str(ROOT)])
        except subprocess.CalledProcessError as error:
            if re.search(r"No matching distribution found for torch==\S+\+cpu", error.output):
                raise CannotBuildError(
                    "pip finds no build of torch for a CPU in the places it is set up for"
                ) from None
            raise
    return image_name(target)


@contextmanager
def _pip_as_here() -> Iterator[list[str]]:
    """Mounts that let pip inside the build find what it finds here: its settings, local folders, cache and CAs."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
    )
    settings = dict(re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed.stdout, re.MULTILINE))
    bundle = Path(settings.pop("cert", os.environ.get("SSL_CERT_FILE", _SYSTEM_BUNDLE)))
    values = [value for one in settings.values() for value in one.split()]
    indexes = [Path(urlsplit(value).path).parent for value in values if value.startswith("file:")]  # and files beside
    folders = {str(folder) for folder in (*indexes, *map(Path, values)) if folder.is_absolute()}
    with tempfile.TemporaryDirectory() as scratch_name:
        config = Path(scratch_name) / "pip.conf"
        config.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
        cache = Path(tempfile.gettempdir()) / "mpm-pip-cache"
        cache.mkdir(exist_ok=True)
        mounts = [f"{config}:/etc/pip.conf:ro", f"{cache}:/root/.cache/pip"]
        mounts += [f"{folder}:{folder}:ro" for folder in sorted(folders) if Path(folder).is_dir()]
        mounts += [f"{bundle}:{_SYSTEM_BUNDLE}:ro"] if bundle.is_file() else []
        yield mounts


def _exists(image: str) -> bool:
    return subprocess.run(["podman", "image", "exists", image]).returncode == 0


def _run(command: list[str]) -> None:
    """Run a command; its output, both streams together, is that of the CalledProcessError if it fails."""
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    try:
        install_programs()
        for target in sys.argv[1:] or TARGETS:
            print(build_image(target))
    except CannotBuildError as error:
        print(error, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(error.output[-4000:], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
