"""Fetch files by URL and refuse what is not what was asked for.

python download.py LIST.yml FOLDER
"""

import hashlib
import os
import re
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

_CHUNK_BYTES = 2**20
_ATTEMPTS = 5


def check(files: Any) -> None:
    """Raise a ValueError where the list could not be followed."""
    if not isinstance(files, dict) or not files:
        raise ValueError(f"expected a mapping of file names, got {files!r}")
    for name, entry in files.items():
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", str(name)):
            raise ValueError(f"expected a file name without folders, got {name!r}")
        if not isinstance(entry, dict) or set(entry) != {"url", "sha256"}:
            raise ValueError(f"{name}: expected url and sha256, got {entry!r}")
        if not str(entry["url"]).startswith(("https://", "http://")):
            raise ValueError(f"{name}: url: expected https://..., got {entry['url']!r}")
        if not re.fullmatch(r"[0-9a-f]{64}", str(entry["sha256"])):
            raise ValueError(f"{name}: sha256: expected 64 hexadecimal digits, got {entry['sha256']!r}")


def fetch(url: str, sha256: str, path: Path) -> None:
    """Download a file; it appears under its name only when it is whole and right.

    Raises:
        OSError: the server could not be reached, several times.
        ValueError: it gave something else.
    """
    partial = path.with_name(f".{path.name}.part")
    for attempt in range(_ATTEMPTS):
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(url, timeout=60) as response, partial.open("wb") as file:
                while chunk := response.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
                if file.tell() < int(response.headers.get("Content-Length", 0)):
                    raise OSError("the connection broke off")
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == _ATTEMPTS - 1:
                raise
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
        time.sleep(2**attempt)
    if digest.hexdigest() != sha256:
        partial.unlink()
        raise ValueError(f"{url}: expected SHA-256 {sha256}, got {digest.hexdigest()}")
    os.replace(partial, path)


def main() -> int:
    listed, folder = Path(sys.argv[1]), Path(sys.argv[2])
    name = ""
    try:
        files = yaml.safe_load(listed.read_text())
        check(files)
        for name, entry in files.items():
            fetch(entry["url"], entry["sha256"], folder / name)
            print(f"fetched {name}")
    except (OSError, ValueError, yaml.YAMLError) as error:
        print(f"{name or listed}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
