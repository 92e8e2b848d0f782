"""The engine: takes encoded pictures, answers with encoded masks, whatever server stands in front.

decode and cut (threads) -> batch, stages and merges (one device thread) -> labels and encode (threads)
"""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpm_ops import Segmenter, TooManyWindowsError
from mpm_ops.classes import Classes
from mpm_ops.labels import label_map
from mpm_ops.windows import WindowPlan, cut_windows, plan_windows

from . import codec, views
from .config import ServingConfig
from .errors import ErrorKind, ServingError
from .options import RequestOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentReply:
    """An answer.

    Attributes:
        body: encoded as the request's media type.
        media_type: of the body.
        tokens: of the whole picture, at the start and after each merge.
        seconds: how long each step took.
    """

    body: bytes
    media_type: str
    tokens: tuple[int, ...]
    seconds: dict[str, float]


@dataclass(slots=True)
class _Job:
    """A request on its way."""

    options: RequestOptions
    answer: "Future[SegmentReply]"
    image: np.ndarray
    plan: WindowPlan
    windows: Tensor  # [num_windows, 3, H, W]
    seconds: dict[str, float]
    queued_at: float
    logits: list[Tensor] = field(default_factory=list)  # [K, Gh, Gw] per window
    merge_maps: list[Tensor] = field(default_factory=list)  # [N] per window
    lengths: list[list[int]] = field(default_factory=list)  # image tokens at the start and after each merge


class Engine:
    """Runs one model for many requests at a time.

    A request's failure is its own: it reaches the future of that request as a `ServingError` and
    leaves its neighbours alone.
    """

    def __init__(self, model: Segmenter, classes: Classes, config: ServingConfig) -> None:
        if len(classes) != model.config.n_cls:
            raise ValueError(f"classes: expected {model.config.n_cls}, got {len(classes)}")
        self._model = model
        self._classes = classes
        self._config = config
        self._ready: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._decoders = ThreadPoolExecutor(config.codec_threads, thread_name_prefix="decode")
        self._encoders = ThreadPoolExecutor(config.codec_threads, thread_name_prefix="encode")
        self._device = threading.Thread(target=self._serve_device, name="device", daemon=True)
        self._device.start()

    def submit(self, data: bytes | bytearray, options: RequestOptions) -> "Future[SegmentReply]":
        """Take an encoded picture; the future gives a SegmentReply or raises a ServingError."""
        answer: Future[SegmentReply] = Future()
        self._decoders.submit(self._guard, answer, self._prepare, data, options, answer)
        return answer

    def close(self) -> None:
        """Finish what was submitted, then stop."""
        self._decoders.shutdown()
        self._ready.put(None)
        self._device.join()
        self._encoders.shutdown()

    def _prepare(self, data: bytes | bytearray, options: RequestOptions, answer: "Future[SegmentReply]") -> None:
        start = perf_counter()
        config = self._config
        image = codec.decode_image(data, max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
        try:
            plan = plan_windows(image.shape[0], image.shape[1], self._model.inference)
        except TooManyWindowsError as error:
            raise ServingError(ErrorKind.TOO_LARGE, f"image: {error}") from None
        windows = cut_windows(image, plan, self._model.inference)
        now = perf_counter()
        self._ready.put(_Job(options, answer, image, plan, windows, {"decode": now - start}, queued_at=now))

    def _serve_device(self) -> None:
        while (job := self._ready.get()) is not None:
            jobs = [job]
            num_windows = job.plan.num_windows
            closing = False
            while num_windows < self._config.max_batch_windows and not self._ready.empty():
                job = self._ready.get()
                if job is None:
                    closing = True
                    break
                jobs.append(job)
                num_windows += job.plan.num_windows
            self._compute(jobs)
            if closing:
                return

    def _compute(self, jobs: Sequence[_Job]) -> None:
        now = perf_counter()
        for job in jobs:
            job.seconds.update(queue=now - job.queued_at, compute=0.0, merge=0.0)
        items = [(job, i) for job in jobs for i in range(job.plan.num_windows)]
        try:
            for start in range(0, len(items), self._config.max_batch_windows):
                self._run_group(items[start : start + self._config.max_batch_windows])
        except Exception:
            logger.exception("computing a batch of %d requests failed", len(jobs))
            for job in jobs:
                _fail(job.answer, ServingError(ErrorKind.INTERNAL, "computing the picture failed"))
            return
        for job in jobs:
            self._encoders.submit(self._guard, job.answer, self._finish, job)

    @torch.inference_mode()
    def _run_group(self, items: Sequence[tuple[_Job, int]]) -> None:
        model, start, merging = self._model, perf_counter(), 0.0
        batch = model.embed(torch.stack([job.windows[i] for job, i in items]))
        special = model.encoder.num_special
        lengths = [batch.tokens.lengths]
        for stage in model.stages:
            batch = model.run_blocks(stage, batch)
            if stage.merges:
                before_merge = perf_counter()
                batch = model.merge(batch)
                merging += perf_counter() - before_merge
                lengths.append(batch.tokens.lengths)
        logits = model.decode(batch)
        elapsed = perf_counter() - start

        grid = -(-items[0][0].plan.window_size // model.config.patch_size)
        for b, (job, _) in enumerate(items):
            job.logits.append(logits[b].T.unflatten(1, (grid, grid)))
            merge_map = torch.arange(grid * grid) if batch.merge_maps is None else batch.merge_maps[b]
            job.merge_maps.append(merge_map)
            job.lengths.append([step[b] - special for step in lengths])
        for job in {id(job): job for job, _ in items}.values():
            job.seconds["compute"] += elapsed - merging
            job.seconds["merge"] += merging

    def _finish(self, job: _Job) -> None:
        start = perf_counter()
        wants_confidence = job.options.view == "confidence"
        result = label_map(
            torch.stack(job.logits), job.plan, self._model.config.patch_size, confidence=wants_confidence
        )
        labeled = perf_counter()
        job.seconds["labels"] = labeled - start
        tokens = tuple(sum(window[step] for window in job.lengths) for step in range(len(job.lengths[0])))
        body = self._encode(job, result.labels, result.confidence, tokens)
        job.seconds["encode"] = perf_counter() - labeled
        job.answer.set_result(SegmentReply(body, job.options.media_type, tokens, job.seconds))

    def _encode(self, job: _Job, labels: np.ndarray, confidence: np.ndarray | None, tokens: tuple[int, ...]) -> bytes:
        options = job.options
        if options.view == "overlay":
            return codec.encode_picture(views.overlay_view(job.image, labels, self._classes), options.media_type)
        if options.view == "tokens":
            maps = [m.numpy() for m in job.merge_maps]
            shown = views.tokens_view(job.image, job.plan, maps, self._model.config.patch_size, tokens)
            return codec.encode_picture(shown, options.media_type)
        if options.view == "confidence":
            assert confidence is not None
            return codec.encode_picture(views.confidence_view(confidence), options.media_type)
        if options.media_type == "application/json":
            return codec.encode_json(self._describe(job, labels))
        if options.media_type == "application/x-npy":
            return codec.encode_npy(labels)
        return codec.encode_mask_png(labels, self._classes)

    def _describe(self, job: _Job, labels: np.ndarray) -> dict[str, Any]:
        return {
            "request_id": job.options.request_id,
            "height": labels.shape[0],
            "width": labels.shape[1],
            "classes": codec.describe_classes(labels, self._classes),
            "tokens_per_window": job.lengths,
            "timings_ms": {step: round(1000 * seconds, 3) for step, seconds in job.seconds.items()},
        }

    @staticmethod
    def _guard(answer: "Future[SegmentReply]", step: Any, *args: Any) -> None:
        """Run one step of one request; what it raises is that request's answer."""
        try:
            step(*args)
        except ServingError as error:
            _fail(answer, error)
        except Exception:
            logger.exception("a request failed")
            _fail(answer, ServingError(ErrorKind.INTERNAL, "the request failed inside the server"))


def _fail(answer: "Future[SegmentReply]", error: ServingError) -> None:
    if not answer.done():
        answer.set_exception(error)
