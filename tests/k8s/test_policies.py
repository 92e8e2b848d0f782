"""checkov's policies for Kubernetes, in an environment of its own because it brings 290 MB."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rendering import COMPONENTS, K8S, OVERLAYS, ROOT, render, render_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHECKOV = "checkov==3.3.30"
ENVIRONMENT = ROOT / ".cache" / "checkov"
SETTINGS = K8S / "checkov.yml"


@pytest.fixture(scope="module")
def checkov() -> Path:
    program = ENVIRONMENT / "bin" / "checkov"
    if not program.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        install = [str(ENVIRONMENT / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", CHECKOV]
        done = subprocess.run(install, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{CHECKOV} can't be installed: {done.stderr.strip().splitlines()[-1]}")
    return program


def scan(checkov: Path, folder: Path, *options: str) -> list[dict[str, Any]]:
    """Failed checks of all manifests in a folder."""
    command = [str(checkov), "-d", str(folder), "--framework", "kubernetes", "--skip-download", "--compact", "--quiet"]
    done = subprocess.run([*command, "-o", "json", *options], capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found.get("summary", found)["parsing_errors"] == 0
    failed: list[dict[str, Any]] = found.get("results", {}).get("failed_checks", [])
    return failed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All overlays and components, their images pinned as for a release."""
    out = tmp_path_factory.mktemp("rendered")
    texts = {overlay.replace("/", "-"): render(overlay) for overlay in OVERLAYS}
    texts |= {f"with-{component}": render_with(component) for component in COMPONENTS}
    for name, text in texts.items():
        (out / f"{name}.yaml").write_text(re.sub(r"image: \S+", f"image: example.com/mpm@sha256:{'0a' * 32}", text))
    return out


def test_nothing_fails_but_what_has_a_reason(checkov: Path, folder: Path) -> None:
    failed = scan(checkov, folder, "--config-file", str(SETTINGS))
    assert not {(check["check_id"], check["check_name"], check["resource"]) for check in failed}


def test_every_reason_is_needed_and_given(checkov: Path, folder: Path) -> None:
    failed = {check["check_id"] for check in scan(checkov, folder)}
    assert failed == set(yaml.safe_load(SETTINGS.read_text())["skip-check"])
    lines = [line for line in SETTINGS.read_text().splitlines() if "- CKV" in line]
    assert all(len(line.partition("# ")[2]) > 20 for line in lines)
