"""What the edge tells by itself: the models behind it, their live figures, its paths as OpenAPI, and the page."""

import asyncio
import json
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web
from prometheus_client.parser import text_string_to_metric_families

from .page import HEADERS, Page

_SECONDS = 3.0  # that a model has to tell of itself
_LIVE_SECONDS = 0.9  # as old may figures be, however many pages look at them
_OPENAPI = Path(__file__).with_name("openapi.yaml")
_UNMERGED = "off"  # the schedule of windows that never merge


class Service:
    """Answers what is asked about the service.

    Args:
        session: that asks the models.
        models: tells the URL of each model's metrics, by name.
        is_triton: the server behind is Triton, else TorchServe.
        page: for people, if there is to be one.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        models: Callable[[], Mapping[str, str]],
        *,
        is_triton: bool,
        page: Page | None,
    ) -> None:
        self._session, self._models, self._is_triton, self._page = session, models, is_triton, page
        self._looking = asyncio.Lock()
        self._live: tuple[float, dict[str, Any]] = (-_LIVE_SECONDS, {})

    async def answer(self, path: str) -> web.Response | None:
        """The answer to a GET; None for a path of the server behind."""
        if path == "/info":
            return _json(await self._info())
        if path == "/live":
            return _json({"models": await self._figures()})
        if path == "/openapi.json":
            return _json(describe_paths(await self._info()))
        return None if self._page is None else await self._page.answer(path)

    async def _info(self) -> dict[str, Any]:
        told = await self._ask_models("/info")
        models = [
            {"name": name, "is_ready": text is not None, "path": f"/predictions/{name}", **json.loads(text or "{}")}
            for name, text in told.items()
        ]
        return {
            "version": _version(),
            "server": "triton" if self._is_triton else "torchserve",
            "models": models,
            "examples": [] if self._page is None else self._page.examples,
        }

    async def _figures(self) -> dict[str, Any]:
        clock = asyncio.get_running_loop().time
        async with self._looking:
            if clock() - self._live[0] > _LIVE_SECONDS:
                told = await self._ask_models("/metrics")
                self._live = (clock(), {name: figures_of(text) for name, text in told.items() if text is not None})
            return self._live[1]

    async def _ask_models(self, path: str) -> dict[str, str | None]:
        """What each model's own port answers; None where it doesn't."""
        urls = self._models()
        texts = await asyncio.gather(*(self._ask(url.removesuffix("/metrics") + path) for url in urls.values()))
        return dict(zip(urls, texts, strict=True))

    async def _ask(self, url: str) -> str | None:
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=_SECONDS)) as answer:
                return await answer.text() if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None


def figures_of(metrics: str) -> dict[str, float]:
    """The few numbers that the page shows, of a model's metrics; all but the gauges count from its start on."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            name = sample.name.removesuffix("_total")
            if name == "mpm_tokens" and sample.labels["schedule"] != _UNMERGED:
                point, stage = sample.labels["point"], sample.labels["stage"]
                sums[point] = sums.get(point, 0) + sample.value
                name = "first" if (point, stage) == ("in", "0") else ""
            sums[name] = sums.get(name, 0) + sample.value
    return {
        "pictures": sums.get("mpm_images", 0),
        "tokens": sums.get("first", 0),
        "tokens_saved": sums.get("in", 0) - sums.get("out", 0),
        "compute_seconds": sums.get("mpm_stage_seconds_sum", 0),
        "merge_seconds": sums.get("mpm_merge_seconds_sum", 0),
        "inflight": sums.get("mpm_inflight_requests", 0),
        "waiting_windows": sums.get("mpm_waiting_windows", 0),
        "agreement_sum": sums.get("mpm_agreement_ratio_sum", 0),
        "agreement_count": sums.get("mpm_agreement_ratio_count", 0),
    }


def describe_paths(info: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAPI's description of the paths of one server, with the names of its models and mergers."""
    document: dict[str, Any] = json.loads(_document())
    document["info"]["version"] = info["version"]
    document["paths"] = {
        path: methods
        for path, methods in document["paths"].items()
        if methods.pop("x-server", info["server"]) == info["server"]
    }
    mergers = [merger for model in info["models"] for merger in model.get("mergers", ())]
    allowed = {
        "Model": [model["name"] for model in info["models"]],
        "Schedule": [merger["value"] for merger in mergers if merger["header"] == "X-MPM-Schedule"],
        "Merger": [merger["value"] for merger in mergers if merger["header"] == "X-MPM-Merger"],
    }
    for name, values in allowed.items():
        if values:
            document["components"]["parameters"][name]["schema"]["enum"] = sorted(set(values))
    return document


@cache
def _document() -> str:
    return json.dumps(yaml.safe_load(_OPENAPI.read_text()))


@cache
def _version() -> str:
    try:
        return version("mpm-segmenter")
    except PackageNotFoundError:  # run from its source alone
        return "0"


def _json(fields: Mapping[str, Any]) -> web.Response:
    return web.Response(
        body=json.dumps(fields).encode() + b"\n", headers={**HEADERS, "Content-Type": "application/json"}
    )
