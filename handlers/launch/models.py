"""What launchers know of the models that they serve: their configurations, and where they tell how they get on."""

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from handlers.config import CONFIG_KEY, ServingConfig

from .processes import free_port

_PORTS_VARIABLE = "MPM_WATCH_PORTS"  # set by launchers: ports by model, as JSON


def read_archive(path: Path) -> ServingConfig:
    """The configuration in a TorchServe archive; the default of what can't be read, which the model will tell."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _parse(archive.read("model-config.yaml"), CONFIG_KEY)
    except (OSError, KeyError, zipfile.BadZipFile):
        return ServingConfig()


def read_repository(path: Path) -> ServingConfig:
    """The configuration of a model's latest version in a Triton repository; the default of what can't be read."""
    versions = [folder for folder in path.iterdir() if folder.name.isdecimal()]
    try:
        return _parse((max(versions, key=lambda folder: int(folder.name)) / "serving.yaml").read_bytes())
    except (OSError, ValueError):
        return ServingConfig()


class Watch:
    """Where models tell how they get on: one that exports no metrics does so on loopback, for its launcher.

    Args:
        configs: of the models, by name.

    Attributes:
        urls: of their metrics, by name.
        environment: that the models need.
    """

    def __init__(self, configs: Mapping[str, ServingConfig]) -> None:
        ports = {name: free_port() for name, config in configs.items() if not config.metrics_port}
        self.environment = {_PORTS_VARIABLE: json.dumps(ports)}
        self.urls = {
            name: f"http://127.0.0.1:{ports[name]}/metrics" if name in ports else _metrics_url(config)
            for name, config in configs.items()
        }


def with_watch(config: ServingConfig, model: str) -> ServingConfig:
    """The configuration of a model with a port for its metrics, if it has none and its launcher gave it one."""
    port = json.loads(os.environ.get(_PORTS_VARIABLE, "{}")).get(model, 0)
    if config.metrics_port or not port:
        return config
    return replace(config, metrics_host="127.0.0.1", metrics_port=port)


def _metrics_url(config: ServingConfig) -> str:
    host = "127.0.0.1" if config.metrics_host in ("0.0.0.0", "localhost") else config.metrics_host
    return f"http://{host}:{config.metrics_port}/metrics"


def _parse(text: bytes, section: str | None = None) -> ServingConfig:
    try:
        values: Any = yaml.safe_load(text) or {}
        if section is not None:
            values = values.get(section, {}) if isinstance(values, Mapping) else {}
        return ServingConfig.from_mapping(values)
    except (yaml.YAMLError, ValueError, TypeError):
        return ServingConfig()
