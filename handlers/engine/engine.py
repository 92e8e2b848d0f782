"""The engine: takes encoded pictures, answers with encoded masks, whatever server stands in front.

admit -> decode and cut (threads) -> schedule, run, route (one thread, see `loop`) -> labels and encode (threads)

Windows are the unit of batching. Between two stages they wait in the scheduler, because only a merge tells
how long each of them became; the group that they run in next is chosen anew every time.
"""

import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handlers.api import decode
from handlers.api.formats import FORMATS
from handlers.api.options import RequestOptions
from handlers.config import ServingConfig
from handlers.errors import ErrorKind, ServingError
from handlers.observe.log import describe_request
from handlers.observe.metrics import Metrics
from handlers.observe.tracing import NO_SPAN, RequestSpan
from mpm_ops import Segmenter, TooManyWindowsError
from mpm_ops.classes import Classes
from mpm_ops.labels import LabelMap, label_map, label_maps
from mpm_ops.merging import Merger, Mpm, NoMerging, make_merger
from mpm_ops.runtime import Runtime, make_runtime
from mpm_ops.runtime.graphs import PATIENCE, GraphRuntime
from mpm_ops.stages import format_schedule
from mpm_ops.transfers import upload, use_own_stream
from mpm_ops.windows import WindowPlan, cut_windows, fit_picture, plan_windows

from .admission import Admission
from .agreement import Agreement, Sampler
from .computing import Computer
from .description import describe_model
from .lane import Lane
from .loop import Loop
from .request import Group, Picture, Reply, Request, Window, internal_error, only_reply
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

_UNMERGED = format_schedule(())  # the lanes without merging
_WATCH_SECONDS = 0.05  # between two looks of the watchdog


class Engine:
    """Runs one model for many requests at a time.

    A request's failure is its own: it reaches the answer of that request as a `ServingError` and
    leaves its neighbours alone.

    Args:
        model: its merger is the default; others are allowed by the configuration.
        classes: names and colours.
        config: see `ServingConfig`.
        name: under which the model is served, for metrics.
        on_fatal: called when the device is beyond help, after everything in flight has failed. By
            default the process ends, for its supervisor to start another.
        observer: called after each group with the group and its seconds.
        keeps_bodies: whoever calls keeps the pictures that came until they are answered, so they count as long.
        lookahead: groups launched behind the one that runs; None for one on a GPU and none elsewhere.
        runtime: that runs the model in place of the configuration's.
    """

    def __init__(
        self,
        model: Segmenter,
        classes: Classes,
        config: ServingConfig,
        *,
        name: str = "segmenter",
        on_fatal: Callable[[], None] = lambda: os._exit(70),
        observer: Callable[[Group, float], None] = lambda group, seconds: None,
        keeps_bodies: bool = False,
        lookahead: int | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        if len(classes) != model.config.n_cls:
            raise ValueError(f"classes: expected {model.config.n_cls}, got {len(classes)}")
        self._model = model
        self._classes = classes
        self._config = config
        self._on_fatal = on_fatal
        self._keeps_bodies = keeps_bodies
        self._offered = _offered(model, config)
        reference = {_UNMERGED: NoMerging(tower=model.tower)} if config.agreement_fraction else {}
        mergers: dict[str, Merger] = {**reference, **self._offered}
        self._runtime = runtime or make_runtime(
            model,
            config.runtime,
            config.precision,
            mergers=list(mergers.values()),
            graph_bytes=config.graph_bytes(model.encoder.pos_embed.device.type),
            threads=config.torch_threads,
            streams=config.streams,
        )
        device = self._device_of_model = model.encoder.pos_embed.device
        stages = self._stages = {name: merger.stages for name, merger in mergers.items()}
        self._lanes = {name: Lane(0, name, len(its_stages)) for name, its_stages in stages.items()}
        self._default = _name(model.merger, model)
        self._special = model.encoder.num_special
        self._grid = -(-model.inference.window_size // model.config.patch_size)
        self._tokens_of_window = self._grid**2 + self._special
        scheduler = Scheduler(
            max_batch_tokens=config.max_batch_tokens,
            # streams compute window by window: more in a group would only wait for each other
            max_group_windows=1 if config.deterministic or self._runtime.streams else config.max_group_windows,
            max_group_delay=config.max_group_delay_ms / 1000,
            bulk_patience=config.bulk_patience_seconds,
            bucket=self._runtime.bucket,
        )
        self._admission = Admission(
            config.max_inflight_tokens,
            config.max_inflight_mib * 2**20,
            config.deadline_seconds,
            capacity=lambda: self.metrics.capacity,
        )
        self._lock = threading.Lock()
        self._open: set[Request] = set()  # guarded by the lock
        info = self._describe(device)
        self.metrics = Metrics(name, grid=self._grid, info=info)
        self.metrics.watch_inflight(lambda: self.inflight, lambda: self._admission.inflight_bytes)
        first = self._lanes[self._default]
        self.metrics.expect(replace(first, stage=i) for i in range(first.num_stages))
        sampler = Sampler(config.agreement_fraction, min(config.agreement_fraction, config.agreement_min_fraction))
        patch_size = model.config.patch_size
        self._agreement: Agreement | None = Agreement(
            sampler, self._compute_unmerged, self.metrics, classes, patch_size
        )
        port = config.metrics_port
        described = describe_model(model, classes, config, self._offered, info)
        self._stop_metrics = self.metrics.serve(config.metrics_host, port, described) if port else lambda: None

        self._loop = Loop(
            device,
            scheduler,
            Computer(model, self._runtime, stages).launch,
            self.metrics,
            streams=[Computer(model, stream, stages).launch for stream in self._runtime.streams],
            num_special=self._special,
            lookahead=lookahead,
            on_group=observer,
            on_computed=self._computed,
            on_lost=self._give_up,
        )
        own_stream: dict[str, Any] = {"initializer": use_own_stream, "initargs": (device,)}
        self._decoders = ThreadPoolExecutor(config.codec_threads, "decode", **own_stream)
        self._apart = ThreadPoolExecutor(config.codec_threads, "decode apart", **own_stream)  # may wait for long
        self._encoders = ThreadPoolExecutor(config.codec_threads, "encode", **own_stream)
        self._stopped = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._loop.start()
        self._watchdog.start()
        logger.info("serving on %s, %s; merger %s", self._runtime.name, self._runtime.precision, model.merger)

    def warm_up(self, pictures: Iterable[bytes]) -> None:
        """Compute pictures before requests come; no metric counts them and none is sampled.

        Other mergers that requests may ask for compute each once: one that can't is known now.
        The runtime prepares the lengths that windows may come to first. Where graphs are captured, each picture is
        computed as often as it takes until those of its shapes are: in full groups, then alone.

        Raises:
            ServingError: one was not answered; the engine would answer nobody.
        """
        self._runtime.warm_up([*self._offered.values()])
        self._loop.streams = self._loop.streams[: len(self._runtime.streams)]  # it may have given them up
        metrics, agreement = self.metrics, self._agreement
        self.metrics = self._loop.metrics = Metrics("warm-up", grid=self._grid, info={})
        self._agreement = None
        try:
            for picture in pictures:
                for together in self._warm_up_rounds(picture):
                    answers = [self.submit(picture, RequestOptions(request_id="warm-up")) for _ in range(together)]
                    for answer in answers:
                        answer.result()
                for name in self._offered.keys() - {self._default}:
                    merger = str(self._offered[name])
                    self.submit(picture, RequestOptions(request_id="warm-up", merger=merger)).result()
        finally:
            self.metrics = self._loop.metrics = metrics
            self._agreement = agreement

    def _warm_up_rounds(self, picture: bytes) -> list[int]:
        """How often to send a picture at once, round by round."""
        if not isinstance(self._runtime, GraphRuntime):
            return [1]
        config, times = self._config, PATIENCE + 1
        source = decode.read_picture(picture, max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
        most = min(config.max_group_windows, config.max_inflight_tokens // self._tokens_of_window)
        full = max(1, most // self._plan(*source.size).num_windows)
        return [full] * times + [1] * times

    # Requests

    def submit(self, data: bytes | bytearray, options: RequestOptions, span: RequestSpan = NO_SPAN) -> Request:
        """Take a request of one encoded picture; its answer is a Reply or a ServingError."""
        request = self.open(options.request_id, span=span)
        self.take(request, [data], options)
        return request

    def open(
        self,
        request_id: str,
        *,
        arrived: float | None = None,
        timeout_seconds: float = 0.0,
        span: RequestSpan = NO_SPAN,
        render: Callable[[Sequence[Reply]], Any] = only_reply,
    ) -> Request:
        """Begin a request: from now on its deadline holds, and its end is counted and logged.

        Args:
            request_id: names it.
            arrived: when it came, on the clock of `time.monotonic`; now, if that isn't known.
            timeout_seconds: its client's own deadline, which can only be an earlier one; 0 for none.
            span: of the request.
            render: makes the answer from the pictures' replies.
        """
        arrived = monotonic() if arrived is None else arrived
        seconds = min(timeout_seconds or math.inf, self._config.deadline_seconds)
        on_end = partial(self._ended, self.metrics)  # those of this moment: a warm-up has others
        request = Request(request_id, arrived, arrived + seconds, span=span, render=render, on_end=on_end)
        with self._lock:
            self._open.add(request)
        return request

    def take(self, request: Request, pictures: Sequence[bytes | bytearray], options: RequestOptions) -> None:
        """Compute the pictures of a request, which are admitted all or none; never raises.

        What can be refused from their headers is refused at once.
        """
        with request.guarded():
            admitted = self._admit(request, pictures, options)
            for picture in admitted:
                try:
                    threads = self._apart if picture.source.is_apart else self._decoders
                    threads.submit(self._guard, self._prepare, picture)
                except RuntimeError:  # closed in between
                    raise ServingError(ErrorKind.OVERLOADED, "the server is shutting down") from None

    def close(self) -> None:
        """Refuse new requests, finish those that were accepted, then stop."""
        self._admission.close()
        self._decoders.shutdown()
        self._apart.shutdown()
        self._loop.close()
        self._encoders.shutdown()
        self._stopped.set()
        self._watchdog.join()
        self._stop_metrics()

    @property
    def lookahead(self) -> int:
        """Groups launched behind the one that runs; may be changed at any time."""
        return self._loop.lookahead

    @lookahead.setter
    def lookahead(self, number: int) -> None:
        self._loop.lookahead = number

    @property
    def inflight(self) -> int:
        """Pictures accepted and not yet answered."""
        return self._admission.num_inflight

    def _admit(
        self, request: Request, pictures: Sequence[bytes | bytearray], options: RequestOptions
    ) -> list[Picture]:
        lane = self._lanes[self._chosen(options)]
        admitted = []
        for i, data in enumerate(pictures):
            try:
                admitted.append(self._read(request, data, i, len(pictures), options, lane))
            except ServingError as error:
                raise error.of_picture(i, len(pictures)) from None
        total = sum(picture.tokens for picture in admitted)
        if len(admitted) > 1 and total > self._config.max_inflight_tokens:
            raise ServingError(
                ErrorKind.TOO_LARGE,
                f"expected a batch of at most {self._config.max_inflight_tokens} tokens, got {len(admitted)} pictures "
                f"of {total}; send them in several requests",
            )
        self._admission.enter(admitted)
        if not request.begin(admitted):
            for picture in admitted:
                self._admission.leave(picture)
            return []
        return admitted

    def _chosen(self, options: RequestOptions) -> str:
        """The name of the merger that a request asks for."""
        if options.merger is not None:
            try:
                name = _name(make_merger(options.merger, self._model.tower), self._model)
            except ValueError:
                name = ""
            header, got, allowed = "X-MPM-Merger", options.merger, {str(merger) for merger in self._offered.values()}
        elif options.schedule is not None:
            name = got = format_schedule(options.schedule)
            header, allowed = "X-MPM-Schedule", {name for name in self._offered if ":" not in name}
        else:
            return self._default
        if name not in self._offered:
            raise ServingError(
                ErrorKind.BAD_REQUEST, f"{header}: expected one of {', '.join(sorted(allowed))}, got {got!r}"
            )
        return name

    def _read(
        self,
        request: Request,
        data: bytes | bytearray,
        index: int,
        num_pictures: int,
        options: RequestOptions,
        lane: Lane,
    ) -> Picture:
        """Read a picture's header and plan its windows."""
        limits = {"max_bytes": self._config.max_image_bytes, "max_pixels": self._config.max_image_pixels}
        source = decode.read_picture(data, **limits)
        plan = self._plan(*source.size, options.fit)
        if num_pictures > 1:
            options = replace(options, request_id=f"{options.request_id}:{index}")
        return Picture(
            request,
            options,
            lane,
            plan,
            monotonic(),
            source=source,
            reduced_from=source.original_size if source.reduction > 1 else None,
            index=index,
            num_pictures=num_pictures,
            tokens=plan.num_windows * self._tokens_of_window,
            held_bytes=source.num_bytes,
            keeps_maps=any(FORMATS[name].needs_maps for name in options.formats),
        )

    def _ended(self, metrics: Metrics, request: Request, code: int, pictures: Sequence[Picture], error: str) -> None:
        """Release, count and log a request that ends."""
        with self._lock:
            self._open.discard(request)
        for picture in pictures:
            self._admission.leave(picture)
        seconds = monotonic() - request.arrived
        name, trace_id = request.request_id, request.span.trace_id
        metrics.answered(code, seconds, name, trace_id)
        replies = [picture.reply for picture in pictures] if code == 200 else []
        for reply in replies:
            metrics.replied(reply.num_windows, reply.seconds)
        request.span.end(code)
        if logger.isEnabledFor(logging.INFO):
            logger.info(describe_request(name, code, seconds, trace_id=trace_id, replies=replies, error=error))

    # Before the device

    def _prepare(self, picture: Picture) -> None:
        """Decode a picture, cut it into windows and have them computed."""
        needs_image = any(FORMATS[name].needs_image for name in picture.options.formats)
        source, picture.source = picture.source, None
        with self._admission.working(source.decoding_bytes):
            image = source.decode()
            height, width = image.shape[:2]
            if (height, width) != picture.plan.original_size:  # its orientation stood behind its pixels
                picture.plan = self._plan(height, width, picture.options.fit)
            if not needs_image:
                image = fit_picture(image, picture.plan)  # a picture's pixels are its largest part by far
        self._admission.resize(picture, image.nbytes + (source.num_bytes if self._keeps_bodies else 0))
        picture.image = image
        self._enqueue(picture)

    def _enqueue(self, picture: Picture) -> None:
        """Cut a decoded picture into windows that wait for the first stage."""
        assert picture.image is not None
        as_bytes = self._device_of_model.type == "cuda"  # a quarter to copy, and the device normalises faster
        cut = cut_windows(picture.image, picture.plan, self._model.inference, as_bytes=as_bytes)
        lane, length = picture.lane, self._tokens_of_window
        windows = [
            Window(picture, lane, length, pixels, [length - self._special])
            for pixels in upload(cut, self._device_of_model)
        ]
        picture.windows, picture.num_left = windows, len(windows)
        picture.ready_at = monotonic()
        picture.seconds["decode"] = picture.ready_at - picture.arrived
        picture.request.span.step("decode", picture.ready_at, picture.seconds["decode"])
        self._loop.add(windows)

    # The watchdog: deadlines hold and a dead or hung device is noticed even when nothing else moves

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_SECONDS):
            now = monotonic()
            with self._lock:
                late = [request for request in self._open if now > request.deadline]
            for request in late:
                request.expire()
            started = self._loop.busy_since
            if started is not None and now - started > self._config.stall_seconds:
                self._give_up(f"a group has been running for {now - started:.0f} s")
                return
            if self._loop.died:
                self._give_up("the device thread died")
                return

    def _give_up(self, reason: str) -> None:
        logger.critical("giving up: %s", reason)
        self._admission.close()
        with self._lock:
            lost = list(self._open)
        for request in lost:
            request.fail(internal_error(f"the server failed: {reason}"))
        self._on_fatal()

    # After the device

    def _computed(self, pictures: Sequence[Picture]) -> None:
        """Have pictures labelled and encoded; on a GPU those whose windows lie alike are labelled together."""
        alike: dict[object, list[Picture]] = {}
        for picture in pictures:
            logits = picture.windows[0].logits if picture.windows else None
            together = logits is not None and logits.is_cuda and not picture.keeps_logits
            together = together and not _needs_confidence(picture)
            alike.setdefault(picture.plan if together else id(picture), []).append(picture)
        for group in alike.values():
            if len(group) == 1:
                self._encoders.submit(self._guard, self._finish, group[0])
            else:
                self._encoders.submit(self._label_together, group)

    def _label_together(self, pictures: Sequence[Picture]) -> None:
        """Label pictures of one plan, and encode each in whichever thread is free."""
        start = monotonic()
        try:
            logits = [self._logits(picture) for picture in pictures]
            masks: Sequence[np.ndarray | None] = label_maps(logits, pictures[0].plan, self._model.config.patch_size)
        except Exception:
            if not any(picture.is_over for picture in pictures):
                logger.exception("%d pictures could not be labelled together", len(pictures))
            masks = [None] * len(pictures)  # one by one: only those at fault fail
        seconds = monotonic() - start
        for picture, mask in zip(pictures, masks, strict=True):
            picture.seconds["labels"] = seconds
            step = partial(self._finish, labels=mask)
            try:
                self._encoders.submit(self._guard, step, picture)
            except RuntimeError:  # closing
                self._guard(step, picture)

    def _logits(self, picture: Picture) -> Tensor:
        """[num_windows, K, Gh, Gw]"""
        grid = (self._grid, self._grid)
        logits = [window.logits.unflatten(1, grid) for window in picture.windows if window.logits is not None]
        return torch.stack(logits) if len(logits) > 1 else logits[0][None]

    def _finish(self, picture: Picture, labels: np.ndarray | None = None) -> None:
        """Label a picture, unless it is, and encode what was asked for."""
        logits = self._logits(picture)
        if picture.keeps_logits:
            if logits.is_cuda:  # who asked may read them in another stream
                torch.cuda.current_stream(logits.device).synchronize()
            picture.request.complete(picture, logits)
            return
        agreement = self._agreement  # before the answer, which may be the end of the warm-up
        formats = {name: FORMATS[name] for name in picture.options.formats}
        patch_size = self._model.config.patch_size
        bytes_per_pixel = max(form.bytes_per_pixel for form in formats.values())
        with self._admission.working(bytes_per_pixel * picture.num_pixels):
            start = monotonic()
            if labels is None:
                mask = label_map(logits, picture.plan, patch_size, confidence=_needs_confidence(picture))
                picture.seconds["labels"] = monotonic() - start
            else:
                mask = LabelMap(labels, None)
            picture.labels, picture.confidence = mask.labels, mask.confidence
            middle = monotonic()
            bodies = {
                name: form.array(picture)
                if form.array is not None and picture.options.arrays
                else form.encode(picture, self._classes, patch_size)
                for name, form in formats.items()
            }
            stop = monotonic()
            picture.seconds["encode"] = stop - middle
        picture.request.span.step("labels", middle, picture.seconds["labels"])
        picture.request.span.step("encode", stop, stop - middle)
        media_type = picture.options.media_type
        tokens, num_windows = picture.tokens_per_stage, picture.plan.num_windows
        reply = Reply(bodies, media_type, tokens, picture.seconds, num_windows, picture.reduced_from)
        self._admission.leave(picture)
        picture.request.complete(picture, reply)
        if agreement is not None and picture.lane.merges:
            agreement.consider(picture, logits, idle=not self.inflight)

    def _compute_unmerged(self, picture: Picture, *, bulk: bool) -> "Request":
        """Compute a picture again without merging, for ourselves: not admitted, not counted and never late."""
        request = Request(picture.options.request_id, monotonic(), math.inf)
        options = replace(picture.options, bulk=bulk)
        lane = self._lanes[_UNMERGED]
        again = Picture(request, options, lane, picture.plan, request.arrived, keeps_logits=True, image=picture.image)
        request.begin([again])
        self._guard(self._enqueue, again)
        return request

    # Small parts

    def _describe(self, device: torch.device) -> dict[str, str]:
        """The labels of `mpm_model_info`."""
        config = self._model.config
        return {
            "variant": f"d{config.d_model}-l{config.n_layers}-p{config.patch_size}-{config.decoder}",
            "schedule": self._default,
            "align": str(self._model.align),
            "runtime": self._runtime.name,
            "precision": self._runtime.precision,
            "device": device.type,
        }

    def _plan(self, height: int, width: int, fit: str | None = None) -> WindowPlan:
        inference = self._model.inference
        try:
            return plan_windows(height, width, replace(inference, fit=fit) if fit else inference)
        except TooManyWindowsError as error:
            raise ServingError(ErrorKind.TOO_LARGE, f"image: {error}") from None

    @staticmethod
    def _guard(step: Callable[[Picture], None], picture: Picture) -> None:
        """Run one step of a picture, unless it is over; an error in it fails the picture."""
        if picture.is_over:
            return
        try:
            step(picture)
        except ServingError as error:
            picture.fail(error)
        except Exception:
            _fail_inside(picture)


def _offered(model: Segmenter, config: ServingConfig) -> dict[str, Merger]:
    """What requests may ask for, by the names in lanes and metrics."""
    found = [model.merger, *(model.mpm(schedule, model.align) for schedule in config.allowed_schedules)]
    for text in config.allowed_mergers:
        try:
            found.append(make_merger(text, model.tower))
        except ValueError as error:
            raise ValueError(f"allowed_mergers: {text}: {error}") from None
    if mixed := next((merger for merger in found if merger.sees_mates), None):
        raise ValueError(f"allowed_mergers: {mixed}: expected one that decides window by window, whatever its mates")
    return {_name(merger, model): merger for merger in found}


def _name(merger: Merger, model: Segmenter) -> str:
    """The schedule of plain MPM as the model aligns it, or "off"; the text of any other merger."""
    schedule = merger.schedule if isinstance(merger, Mpm) else ()
    return format_schedule(schedule) if str(merger) == str(model.mpm(schedule, model.align)) else str(merger)


def _needs_confidence(picture: Picture) -> bool:
    return any(FORMATS[name].needs_confidence for name in picture.options.formats)


def _fail_inside(picture: Picture) -> None:
    """Fail a picture with the error at hand, unless it ended meanwhile and its windows are gone."""
    if not picture.is_over:
        logger.exception("request %s failed", picture.options.request_id)
        picture.fail(internal_error())
