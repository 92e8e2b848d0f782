"""The engine: takes encoded pictures, answers with encoded masks, whatever server stands in front.

admit -> decode and cut (threads) -> schedule, run stages, regroup (one device thread) -> labels and encode (threads)

Windows are what is batched. Between two stages they wait in the scheduler, because only a merge tells
how long each of them became; the group they run in next is chosen anew every time.
"""

import contextlib
import itertools
import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from dataclasses import replace
from time import monotonic
from typing import Any

import numpy as np
import torch

from mpm_ops import Segmenter, TooManyWindowsError
from mpm_ops.classes import Classes
from mpm_ops.runtime import make_runtime
from mpm_ops.runtime.transfers import stack, upload, use_own_stream
from mpm_ops.stages import Stage, WindowBatch, cut_stages, format_schedule
from mpm_ops.windows import WindowPlan, cut_windows, fit_picture, plan_windows

from . import codec
from .admission import Admission, Ticket
from .agreement import Agreement, Sampler
from .clock import DeviceClock
from .config import ServingConfig
from .costs import measure_cost
from .errors import ErrorKind, ServingError
from .exchange import Exchange, only_reply
from .metrics import Metrics
from .options import VIEWS_OF_PIXELS, RequestOptions
from .replies import Segmented, SegmentReply, encode_reply, encoding_bytes
from .scheduler import Group, Lane, Scheduler, Waiting
from .tracing import NO_SPAN, RequestSpan
from .work import Request, Window, by_request

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 0.05  # between two looks of the watchdog
_POOL_GROUPS = 8  # groups' worth of windows among which padded execution chooses mates


class Engine:
    """Runs one model for many requests at a time.

    A request's failure is its own: it reaches the answer of that request as a `ServingError` and
    leaves its neighbours alone. Cancelling the answer drops the request at the next stage.

    Args:
        model: its schedule is the default; others are allowed by the configuration.
        classes: names and colours.
        config: see `ServingConfig`.
        name: under which the model is served, for metrics.
        on_fatal: called when the device is beyond help, after everything in flight has failed. By
            default the process ends, for its supervisor to start another.
        observer: called after each group with the group and its seconds.
        keeps_bodies: whoever calls keeps the pictures that came until they are answered, so they count as long.
    """

    def __init__(
        self,
        model: Segmenter,
        classes: Classes,
        config: ServingConfig,
        *,
        name: str = "segmenter",
        on_fatal: Callable[[], None] = lambda: os._exit(70),
        observer: Callable[[Group["Window"], float], None] = lambda group, seconds: None,
        keeps_bodies: bool = False,
    ) -> None:
        if len(classes) != model.config.n_cls:
            raise ValueError(f"classes: expected {model.config.n_cls}, got {len(classes)}")
        self._model = model
        self._classes = classes
        self._config = config
        self._on_fatal = on_fatal
        self._observer = observer
        self._keeps_bodies = keeps_bodies
        self._offered = {model.schedule, *config.allowed_schedules}
        schedules = self._offered | ({()} if config.agreement_fraction else set())
        self._runtime = make_runtime(
            model,
            config.runtime,
            config.precision,
            schedules=sorted(schedules),
            padded=config.padded,
            graph_bytes=config.graph_mib * 2**20,
        )
        device = self._device_of_model = model.encoder.pos_embed.device
        self._clock = DeviceClock(device)
        self._stages = {schedule: cut_stages(model.config.n_layers, schedule) for schedule in schedules}
        self._special = model.encoder.num_special
        self._grid = -(-model.inference.window_size // model.config.patch_size)
        self._tokens_of_window = self._grid**2 + self._special
        self._scheduler: Scheduler[Window] = Scheduler(
            max_batch_tokens=config.max_batch_tokens,
            max_group_windows=1 if config.deterministic else config.max_group_windows,
            pool_windows=_POOL_GROUPS * config.max_group_windows if config.padded else config.max_group_windows,
            max_group_delay=config.max_group_delay_ms / 1000,
            bulk_patience=config.bulk_patience_seconds,
            cost=measure_cost(model, longest=self._tokens_of_window, max_group_windows=config.max_group_windows)
            if config.padded
            else None,
        )
        self._admission = Admission(
            config.max_inflight_tokens,
            config.max_inflight_mib * 2**20,
            config.deadline_seconds,
            capacity=lambda: self.metrics.capacity,
        )
        self._lock = threading.Lock()
        self._inflight: dict[Future[Any], Request] = {}  # by answer; guarded by the lock
        self._open: set[Exchange] = set()  # guarded by the lock
        self.metrics = Metrics(name, grid=self._grid, info=self._describe(device))
        self.metrics.watch_inflight(lambda: len(self._inflight), lambda: self._admission.inflight_bytes)
        self.metrics.expect(Lane(stage.index, model.schedule) for stage in self._stages[model.schedule])
        sampler = Sampler(config.agreement_fraction, min(config.agreement_fraction, config.agreement_min_fraction))
        patch_size = model.config.patch_size
        self._agreement: Agreement | None = Agreement(
            sampler, self._compute_unmerged, self.metrics, classes, patch_size
        )
        port = config.metrics_port
        self._stop_metrics = self.metrics.serve(config.metrics_host, port) if port else lambda: None

        self._inbox: queue.SimpleQueue[list[Waiting[Window]] | None] = queue.SimpleQueue()
        self._draining = False
        self._group_numbers = itertools.count(1)
        self._group_started: float | None = None
        own_stream: dict[str, Any] = {"initializer": use_own_stream, "initargs": (device,)}
        self._decoders = ThreadPoolExecutor(config.codec_threads, "decode", **own_stream)
        self._encoders = ThreadPoolExecutor(config.codec_threads, "encode", **own_stream)
        self._stopped = threading.Event()
        self._device = threading.Thread(target=self._serve_device, name="device", daemon=True)
        self._watchdog = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._device.start()
        self._watchdog.start()
        logger.info(
            "serving on %s, %s; schedule %s, align %d",
            self._runtime.name,
            self._runtime.precision,
            model.schedule,
            model.align,
        )

    # Taking work

    def warm_up(self, pictures: Iterable[bytes]) -> None:
        """Send pictures through before anyone waits for them; no metric counts them and none is sampled.

        Raises:
            ServingError: one was not answered; the engine would answer nobody.
        """
        metrics, agreement = self.metrics, self._agreement
        self.metrics, self._agreement = Metrics("warm-up", grid=self._grid, info={}), None
        try:
            for picture in pictures:
                self.submit(picture, RequestOptions(request_id="warm-up")).result()
        finally:
            self.metrics, self._agreement = metrics, agreement

    def submit(
        self, data: bytes | bytearray, options: RequestOptions, span: RequestSpan = NO_SPAN
    ) -> "Future[SegmentReply]":
        """Take an encoded picture; the future gives a SegmentReply or raises a ServingError."""
        exchange = self.open(options.request_id, span=span)
        self.take(exchange, [data], options)
        return exchange.answer

    def open(
        self,
        request_id: str,
        *,
        arrived: float | None = None,
        timeout_seconds: float = 0.0,
        span: RequestSpan = NO_SPAN,
        render: Callable[[Sequence[SegmentReply]], Any] = only_reply,
    ) -> Exchange:
        """Begin a request, which from now on ends in time and is counted, whatever becomes of it.

        Args:
            request_id: names it.
            arrived: when it came, on the clock of `time.monotonic`; now, if that isn't known.
            timeout_seconds: its client's own deadline, which can only be an earlier one; 0 for none.
            span: told of its steps and its end.
            render: see `Exchange`.
        """
        arrived = monotonic() if arrived is None else arrived
        seconds = min(timeout_seconds or math.inf, self._config.deadline_seconds)
        metrics = self.metrics  # of this moment: those of a warm-up are others

        def close(exchange: Exchange, code: int, replies: Sequence[SegmentReply]) -> None:
            with self._lock:
                self._open.discard(exchange)
            metrics.answered(code, monotonic() - exchange.arrived, exchange.request_id, exchange.span.trace_id)
            for reply in replies:
                metrics.replied(reply.num_windows, reply.seconds)

        exchange = Exchange(request_id, arrived, arrived + seconds, span=span, render=render, on_end=close)
        with self._lock:
            self._open.add(exchange)
        return exchange

    def take(self, exchange: Exchange, pictures: Sequence[bytes | bytearray], options: RequestOptions) -> None:
        """Compute the pictures of a request, which are admitted all or none; never raises.

        What can be refused from their headers is refused at once.
        """
        with exchange.guarded():
            requests = self._admit(exchange, pictures, options)
            exchange.gather([request.answer for request in requests])
            for request, data in zip(requests, pictures, strict=True):
                try:
                    self._decoders.submit(self._guard, request, self._prepare, request, data)
                except RuntimeError:  # closed in between
                    raise ServingError(ErrorKind.OVERLOADED, "the server is shutting down") from None

    def close(self) -> None:
        """Refuse new requests, finish those that were accepted, then stop."""
        self._admission.close()
        self._decoders.shutdown()
        self._inbox.put(None)
        self._device.join()
        self._encoders.shutdown()
        self._stopped.set()
        self._watchdog.join()
        self._stop_metrics()

    @property
    def inflight(self) -> int:
        """Requests accepted and not yet answered."""
        return len(self._inflight)

    def _admit(
        self, exchange: Exchange, pictures: Sequence[bytes | bytearray], options: RequestOptions
    ) -> list[Request]:
        config = self._config
        schedule = self._model.schedule if options.schedule is None else options.schedule
        if schedule not in self._offered:
            allowed = ", ".join(sorted(map(format_schedule, self._offered)))
            raise ServingError(ErrorKind.BAD_REQUEST, f"X-MPM-Schedule: expected one of {allowed}")
        requests = []
        for i, data in enumerate(pictures):
            try:
                size = codec.read_size(data, max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
                ticket = Ticket(self._plan(*size).num_windows * self._tokens_of_window, len(data))
            except ServingError as error:
                raise error.of_picture(i, len(pictures)) from None
            name = options.request_id if len(pictures) == 1 else f"{options.request_id}:{i}"
            own = replace(options, request_id=name)
            pixels = size[0] * size[1]
            requests.append(Request(own, schedule, Future(), monotonic(), ticket, pixels, exchange.span))
        tickets = [request.ticket for request in requests]
        total = sum(ticket.tokens for ticket in tickets)
        if len(requests) > 1 and total > config.max_inflight_tokens:
            raise ServingError(
                ErrorKind.TOO_LARGE,
                f"expected a batch of at most {config.max_inflight_tokens} tokens, got {len(requests)} pictures of "
                f"{total}; send them in several requests",
            )
        self._admission.enter(tickets)
        with self._lock:
            self._inflight |= {request.answer: request for request in requests}
        for request in requests:
            request.answer.add_done_callback(self._leave)  # which must not hold the request: its answer may be kept
        return requests

    def _leave(self, answer: "Future[SegmentReply]") -> None:
        with self._lock:
            request = self._inflight.pop(answer)
        self._admission.leave(request.ticket)

    def _prepare(self, request: Request, data: bytes | bytearray) -> None:
        config, view = self._config, request.options.view
        limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
        with self._admission.working(codec.DECODING_BYTES * request.pixels):
            if config.jpeg_draft and view is None:  # views show all pixels
                image, size = codec.decode_reduced(
                    data, **limits, enough=lambda *whole: self._plan(*whole).fitted_size
                )
            else:
                image = codec.decode_image(data, **limits)
                size = (image.shape[0], image.shape[1])
            plan = self._plan(*size)
            if view not in VIEWS_OF_PIXELS:
                image = fit_picture(image, plan)  # a picture's pixels are its largest part by far
        self._admission.resize(request.ticket, image.nbytes + (len(data) if self._keeps_bodies else 0))
        self._enqueue(request, image, plan)

    def _enqueue(self, request: Request, image: np.ndarray, plan: WindowPlan) -> None:
        """Cut a picture into windows that wait for the first stage."""
        pixels = upload(cut_windows(image, plan, self._model.inference), self._device_of_model)
        request.image, request.plan = image, plan
        request.windows = [Window(request, window, [self._tokens_of_window - self._special]) for window in pixels]
        request.ready_at = monotonic()
        request.seconds["decode"] = request.ready_at - request.arrived
        request.span.step("decode", request.ready_at, request.seconds["decode"])
        arrivals = [self._waiting(window, 0, self._tokens_of_window) for window in request.windows]
        self.metrics.waiting(arrivals, +1)
        self._inbox.put(arrivals)

    # The device thread: take what came, choose a group, run it, route its windows

    def _serve_device(self) -> None:
        if self._device_of_model.type == "cuda":
            torch.cuda.set_device(self._device_of_model)  # events and kernels of this thread are the current device's
        while self._take_work():
            self.metrics.waiting(self._scheduler.remove(lambda window: window.request.answer.done()), -1)
            group = self._scheduler.next_group(monotonic())
            if group is not None:
                self._group_started = monotonic()
                self.metrics.released(group, self._group_started, padded=self._config.padded)
                self._run(group)
                self._group_started = None

    def _take_work(self) -> bool:
        """Move what came into the scheduler, waiting if there is nothing else to do; False when all is done."""
        while not self._inbox.empty() or not (len(self._scheduler) or self._draining):
            arrivals = self._inbox.get()
            if arrivals is None:
                self._draining = True
            else:
                self._scheduler.add(arrivals, monotonic())
        return len(self._scheduler) > 0

    def _run(self, group: Group[Window]) -> None:
        """Run a group. If it fails, run its halves, so that only the windows at fault fail."""
        windows = [member.payload for member in group.members]
        stage = self._stages[group.lane.schedule][group.lane.stage]
        lengths = [window.lengths[-1] for window in windows]
        try:
            took = self._compute(stage, windows)
        except Exception as error:
            if _is_fatal(error):
                self._give_up(f"the device failed: {error}")
                return
            if len(windows) == 1:
                logger.exception("request %s failed at stage %d", windows[0].request.options.request_id, stage.index)
                _fail(windows[0].request.answer, ServingError(ErrorKind.INTERNAL, "computing the picture failed"))
                return
            took = None
        if took is None:  # only now: the error's traceback kept all that the attempt had allocated
            half = len(windows) // 2
            self._run(Group(group.lane, group.members[:half], group.reason))
            self._run(Group(group.lane, group.members[half:], group.reason))
            return
        seconds, merge_seconds = took
        self._observer(group, seconds)
        self._account(group.lane, windows, seconds, merge_seconds)
        self.metrics.computed(group.lane, lengths, sum(w.lengths[-1] for w in windows), seconds, merge_seconds)
        self._route(stage, windows)  # last: who gets an answer finds it counted

    @torch.inference_mode()
    def _compute(self, stage: Stage, windows: Sequence[Window]) -> tuple[float, float | None]:
        """Run one stage and keep each window's outcome with it; returns the seconds of it all and of its merge."""
        model, clock = self._model, self._clock
        start = clock.mark()
        if stage.index == 0:
            batch = model.embed(stack([window.state for window in windows]))  # type: ignore[misc]
        else:
            batch = WindowBatch.join([window.state for window in windows])  # type: ignore[misc]
        batch = self._runtime.run_blocks(stage, batch)
        before_merge = clock.mark()
        if stage.merges:
            batch = model.merge(batch)
            done = clock.mark()
            for window, state in zip(windows, batch.split(), strict=True):
                window.state = state
                window.lengths.append(len(state.tokens.values) - self._special)
            return clock.seconds(start, done), clock.seconds(before_merge, done)
        logits = self._runtime.decode(batch)
        finite = logits.isfinite().flatten(1).all(dim=1)
        maps = batch.merge_maps or (None,) * len(windows)
        done = clock.mark()
        for window, window_logits, merge_map, ok in zip(windows, logits, maps, finite.tolist(), strict=True):
            window.state, window.logits, window.merge_map, window.is_finite = None, window_logits.T, merge_map, ok
        return clock.seconds(start, done), None

    def _account(self, lane: Lane, windows: Sequence[Window], seconds: float, merge_seconds: float | None) -> None:
        """Tell every request of a group what the group took; those that share it took it together."""
        stop = monotonic()
        requests = by_request(windows)
        group = (next(self._group_numbers), len(windows), len(requests))
        for request, own in requests.items():
            request.seconds["compute"] += seconds - (merge_seconds or 0.0)
            request.seconds["merge"] += merge_seconds or 0.0
            request.span.stage(lane, group, [window.lengths for window in own], stop, seconds, merge_seconds)

    def _route(self, stage: Stage, windows: Sequence[Window]) -> None:
        """Send windows to their next lane, and requests whose windows are all done to be labelled."""
        now = monotonic()
        if stage.merges:
            arrivals = [self._waiting(w, stage.index + 1, w.lengths[-1] + self._special) for w in windows]
            self.metrics.waiting(arrivals, +1)
            self._scheduler.add(arrivals, now)
            return
        for request in by_request(windows):
            logits = [window.logits for window in request.windows if window.logits is not None]
            if not all(window.is_finite for window in request.windows):
                logger.error("request %s: the network gave non-finite logits", request.options.request_id)
                _fail(request.answer, ServingError(ErrorKind.INTERNAL, "the network found no finite answer"))
            elif len(logits) == len(request.windows):
                busy = request.seconds["compute"] + request.seconds["merge"]
                request.seconds["queue"] = max(0.0, now - request.ready_at - busy)
                self._encoders.submit(self._guard, request, self._finish, request)

    def _waiting(self, window: Window, stage: int, length: int) -> Waiting[Window]:
        request = window.request
        lane = Lane(stage, request.schedule)
        return Waiting(lane, length, request.arrived, request.options.bulk, window)

    # The watchdog: deadlines hold and a dead or hung device is noticed even when nothing else moves

    def _watch(self) -> None:
        while not self._stopped.wait(_WATCH_SECONDS):
            now = monotonic()
            with self._lock:
                late = [exchange for exchange in self._open if now > exchange.deadline]
            for exchange in late:
                exchange.expire()
            started = self._group_started
            if started is not None and now - started > self._config.stall_seconds:
                self._give_up(f"a group has been running for {now - started:.0f} s")
                return
            if not self._device.is_alive() and not self._draining:
                self._give_up("the device thread died")
                return

    def _give_up(self, reason: str) -> None:
        logger.critical("giving up: %s", reason)
        self._admission.close()
        with self._lock:
            lost = list(self._open)
        for exchange in lost:
            exchange.fail(ServingError(ErrorKind.INTERNAL, f"the server failed: {reason}"))
        self._on_fatal()

    # Answering

    def _finish(self, request: Request) -> None:
        assert request.image is not None
        assert request.plan is not None
        grid = (self._grid, self._grid)
        segmented = Segmented(
            request.image,
            request.plan,
            torch.stack([window.logits.unflatten(1, grid) for window in request.windows if window.logits is not None]),
            [window.merge_map for window in request.windows],
            [window.lengths for window in request.windows],
            request.seconds,
        )
        agreement = self._agreement  # before the answer, which may be the end of the warm-up
        if not request.encoded:
            if segmented.logits.is_cuda:  # who asked may read them in another stream
                torch.cuda.current_stream(segmented.logits.device).synchronize()
            request.answer.set_result(segmented)
            return
        with self._admission.working(encoding_bytes(request.options) * request.pixels):
            reply = encode_reply(segmented, request.options, self._classes, self._model.config.patch_size)
        encode_seconds, now = reply.seconds["encode"], monotonic()
        request.span.step("labels", now - encode_seconds, reply.seconds["labels"])
        request.span.step("encode", now, encode_seconds)
        with contextlib.suppress(InvalidStateError):  # cancelled, or failed by the watchdog
            request.answer.set_result(reply)
        if agreement is not None and request.schedule:
            agreement.consider(segmented, request.options, idle=not self._inflight)

    def _compute_unmerged(self, merged: Segmented, options: RequestOptions) -> "Future[Segmented]":
        """Compute a picture again without merging, for ourselves: not admitted, not counted and never late."""
        again = Request(options, (), Future(), monotonic(), Ticket(0, 0), 0, NO_SPAN, encoded=False)
        self._guard(again, self._enqueue, again, merged.image, merged.plan)
        return again.answer

    # Small parts

    def _describe(self, device: torch.device) -> dict[str, str]:
        """The labels of `mpm_model_info`."""
        config = self._model.config
        return {
            "variant": f"d{config.d_model}-l{config.n_layers}-p{config.patch_size}-{config.decoder}",
            "schedule": format_schedule(self._model.schedule),
            "align": str(self._model.align),
            "runtime": self._runtime.name,
            "precision": self._runtime.precision,
            "device": device.type,
        }

    def _plan(self, height: int, width: int) -> WindowPlan:
        try:
            return plan_windows(height, width, self._model.inference)
        except TooManyWindowsError as error:
            raise ServingError(ErrorKind.TOO_LARGE, f"image: {error}") from None

    @staticmethod
    def _guard(request: Request, step: Callable[..., None], *args: Any) -> None:
        """Run one step of one request, unless it is over; what the step raises is the request's answer."""
        if request.answer.done():
            return
        try:
            step(*args)
        except ServingError as error:
            _fail(request.answer, error)
        except Exception:
            logger.exception("request %s failed", request.options.request_id)
            _fail(request.answer, ServingError(ErrorKind.INTERNAL, "the request failed inside the server"))


def _is_fatal(error: Exception) -> bool:
    """After such an error every further call on the device fails too."""
    return isinstance(error, torch.AcceleratorError)


def _fail(answer: "Future[SegmentReply]", error: ServingError) -> None:
    with contextlib.suppress(InvalidStateError):
        answer.set_exception(error)
