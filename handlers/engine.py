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
from mpm_ops.labels import label_maps
from mpm_ops.runtime import Runtime, make_runtime
from mpm_ops.runtime.graphs import PATIENCE, GraphRuntime
from mpm_ops.stages import format_schedule
from mpm_ops.transfers import upload, use_own_stream
from mpm_ops.windows import WindowPlan, cut_windows, fit_picture, plan_windows

from . import codec
from .admission import Admission, Ticket
from .agreement import Agreement, Sampler
from .computing import Computer, Times
from .config import ServingConfig
from .costs import measure_cost
from .device import DeviceThread
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
        observer: Callable[[Group["Window"], float], None] = lambda group, seconds: None,
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
        self._observer = observer
        self._keeps_bodies = keeps_bodies
        self._offered = {model.schedule, *config.allowed_schedules}
        schedules = self._offered | ({()} if config.agreement_fraction else set())
        mergers = {schedule: model.mpm(schedule, model.align) for schedule in schedules}
        self._runtime = runtime or make_runtime(
            model,
            config.runtime,
            config.precision,
            mergers=list(mergers.values()),
            graph_bytes=config.graph_bytes(model.encoder.pos_embed.device.type),
        )
        device = self._device_of_model = model.encoder.pos_embed.device
        stages = {schedule: merger.stages for schedule, merger in mergers.items()}
        self._special = model.encoder.num_special
        self._grid = -(-model.inference.window_size // model.config.patch_size)
        self._tokens_of_window = self._grid**2 + self._special
        scheduler: Scheduler[Window] = Scheduler(
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
        self.metrics.expect(Lane(stage.index, model.schedule) for stage in stages[model.schedule])
        sampler = Sampler(config.agreement_fraction, min(config.agreement_fraction, config.agreement_min_fraction))
        patch_size = model.config.patch_size
        self._agreement: Agreement | None = Agreement(
            sampler, self._compute_unmerged, self.metrics, classes, patch_size
        )
        port = config.metrics_port
        self._stop_metrics = self.metrics.serve(config.metrics_host, port) if port else lambda: None

        self._group_numbers = itertools.count(1)
        self._device = DeviceThread(
            device,
            scheduler,
            Computer(model, self._runtime, stages).launch,
            lookahead=lookahead,
            on_removed=lambda windows: self.metrics.waiting(windows, -1),
            on_released=lambda group, now: self.metrics.released(group, now, padded=config.padded),
            on_computed=self._computed,
            on_failed=self._failed,
            on_lost=self._give_up,
        )
        own_stream: dict[str, Any] = {"initializer": use_own_stream, "initargs": (device,)}
        self._decoders = ThreadPoolExecutor(config.codec_threads, "decode", **own_stream)
        self._encoders = ThreadPoolExecutor(config.codec_threads, "encode", **own_stream)
        self._stopped = threading.Event()
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

        Where graphs are captured, each as often as it takes until those of its shapes are: in full groups, then alone.

        Raises:
            ServingError: one was not answered; the engine would answer nobody.
        """
        metrics, agreement = self.metrics, self._agreement
        self.metrics, self._agreement = Metrics("warm-up", grid=self._grid, info={}), None
        try:
            for picture in pictures:
                for together in self._warm_up_rounds(picture):
                    answers = [self.submit(picture, RequestOptions(request_id="warm-up")) for _ in range(together)]
                    for answer in answers:
                        answer.result()
        finally:
            self.metrics, self._agreement = metrics, agreement

    def _warm_up_rounds(self, picture: bytes) -> list[int]:
        """How often to send a picture at once, round by round."""
        if not isinstance(self._runtime, GraphRuntime):
            return [1]
        config, times = self._config, PATIENCE + 1
        size = codec.read_size(picture, max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
        most = min(config.max_group_windows, config.max_inflight_tokens // self._tokens_of_window)
        full = max(1, most // self._plan(*size).num_windows)
        return [full] * times + [1] * times

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
        self._device.close()
        self._encoders.shutdown()
        self._stopped.set()
        self._watchdog.join()
        self._stop_metrics()

    @property
    def lookahead(self) -> int:
        """Groups launched behind the one that runs; may be changed at any time."""
        return self._device.lookahead

    @lookahead.setter
    def lookahead(self, number: int) -> None:
        self._device.lookahead = number

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
            requests.append(Request(own, schedule, Future(), monotonic(), ticket, exchange.span, pixels=pixels))
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
        as_bytes = self._device_of_model.type == "cuda"  # a quarter to copy, and the device normalises faster
        pixels = upload(cut_windows(image, plan, self._model.inference, as_bytes=as_bytes), self._device_of_model)
        request.image, request.plan = image, plan
        request.windows = [Window(request, window, [self._tokens_of_window - self._special]) for window in pixels]
        request.ready_at = monotonic()
        request.seconds["decode"] = request.ready_at - request.arrived
        request.span.step("decode", request.ready_at, request.seconds["decode"])
        arrivals = [self._waiting(window, 0, self._tokens_of_window) for window in request.windows]
        self.metrics.waiting(arrivals, +1)
        self._device.add(arrivals)

    # What the device's thread tells, see `DeviceThread`

    def _computed(self, group: Group[Window], times: Times) -> None:
        """Account for a group that is through, and send its windows on."""
        seconds, merge_seconds = times
        windows = [member.payload for member in group.members]
        self._observer(group, seconds)
        self._account(group.lane, windows, seconds, merge_seconds)
        tokens_in = [window.lengths[group.lane.stage] for window in windows]
        self.metrics.computed(group.lane, tokens_in, sum(w.lengths[-1] for w in windows), seconds, merge_seconds)
        self._route(group.lane, windows)  # last: who gets an answer finds it counted

    def _failed(self, window: Window, stage: int, error: Exception) -> None:
        request_id = window.request.options.request_id
        logger.error("request %s failed at stage %d", request_id, stage, exc_info=error)
        _fail(window.request.answer, ServingError(ErrorKind.INTERNAL, "computing the picture failed"))

    def _account(self, lane: Lane, windows: Sequence[Window], seconds: float, merge_seconds: float | None) -> None:
        """Tell every request of a group what the group took; those that share it took it together."""
        stop = monotonic()
        requests = by_request(windows)
        group = (next(self._group_numbers), len(windows), len(requests))
        for request, own in requests.items():
            request.seconds["compute"] += seconds - (merge_seconds or 0.0)
            request.seconds["merge"] += merge_seconds or 0.0
            request.span.stage(lane, group, [window.lengths for window in own], stop, seconds, merge_seconds)

    def _route(self, lane: Lane, windows: Sequence[Window]) -> None:
        """Send windows to their next lane, and requests whose windows are all done to be labelled."""
        now = monotonic()
        if lane.stage < len(lane.schedule):  # it merged
            arrivals = [self._waiting(w, lane.stage + 1, w.lengths[-1] + self._special) for w in windows]
            self.metrics.waiting(arrivals, +1)
            self._device.scheduler.add(arrivals, now)
            return
        complete: list[Request] = []
        for request in by_request(windows):
            logits = [window.logits for window in request.windows if window.logits is not None]
            if not all(window.is_finite for window in request.windows):
                logger.error("request %s: the network gave non-finite logits", request.options.request_id)
                _fail(request.answer, ServingError(ErrorKind.INTERNAL, "the network found no finite answer"))
            elif len(logits) == len(request.windows):
                busy = request.seconds["compute"] + request.seconds["merge"]
                request.seconds["queue"] = max(0.0, now - request.ready_at - busy)
                complete.append(request)
        if complete:
            self._answer(complete)

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
            started = self._device.busy_since
            if started is not None and now - started > self._config.stall_seconds:
                self._give_up(f"a group has been running for {now - started:.0f} s")
                return
            if self._device.died:
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

    def _answer(self, requests: Sequence[Request]) -> None:
        """Have pictures labelled and encoded; on a GPU those whose windows lie alike are labelled together."""
        alike: dict[object, list[Request]] = {}
        for request in requests:
            together = request.windows[0].logits.is_cuda and request.encoded and request.options.view != "confidence"
            alike.setdefault(request.plan if together else id(request), []).append(request)
        for group in alike.values():
            if len(group) == 1:
                self._encoders.submit(self._guard, group[0], self._finish, group[0])
            else:
                self._encoders.submit(self._label_together, group)

    def _label_together(self, requests: Sequence[Request]) -> None:
        """Label pictures of one plan, and encode each in whichever thread is free."""
        start = monotonic()
        try:
            found = [self._segmented(request) for request in requests]
            masks: Sequence[np.ndarray | None] = label_maps(
                [one.logits for one in found], found[0].plan, self._model.config.patch_size
            )
        except Exception:
            logger.exception("%d pictures could not be labelled together", len(requests))
            masks = [None] * len(requests)  # one by one: only those at fault fail
        seconds = monotonic() - start
        for request, mask in zip(requests, masks, strict=True):
            request.seconds["labels"] = seconds
            try:
                self._encoders.submit(self._guard, request, self._finish, request, mask)
            except RuntimeError:  # closing
                self._guard(request, self._finish, request, mask)

    def _segmented(self, request: Request) -> Segmented:
        assert request.image is not None
        assert request.plan is not None
        grid = (self._grid, self._grid)
        logits = [window.logits.unflatten(1, grid) for window in request.windows if window.logits is not None]
        return Segmented(
            request.image,
            request.plan,
            torch.stack(logits) if len(logits) > 1 else logits[0][None],
            [window.merge_map for window in request.windows],
            [window.lengths for window in request.windows],
            request.seconds,
        )

    def _finish(self, request: Request, labels: np.ndarray | None = None) -> None:
        segmented = self._segmented(request)
        agreement = self._agreement  # before the answer, which may be the end of the warm-up
        if not request.encoded:
            if segmented.logits.is_cuda:  # who asked may read them in another stream
                torch.cuda.current_stream(segmented.logits.device).synchronize()
            request.answer.set_result(segmented)
            return
        with self._admission.working(encoding_bytes(request.options) * request.pixels):
            reply = encode_reply(segmented, request.options, self._classes, self._model.config.patch_size, labels)
        encode_seconds, now = reply.seconds["encode"], monotonic()
        request.span.step("labels", now - encode_seconds, reply.seconds["labels"])
        request.span.step("encode", now, encode_seconds)
        with contextlib.suppress(InvalidStateError):  # cancelled, or failed by the watchdog
            request.answer.set_result(reply)
        if agreement is not None and request.schedule:
            agreement.consider(segmented, request.options, idle=not self._inflight)

    def _compute_unmerged(self, merged: Segmented, options: RequestOptions) -> "Future[Segmented]":
        """Compute a picture again without merging, for ourselves: not admitted, not counted and never late."""
        again = Request(options, (), Future(), monotonic(), Ticket(0, 0), NO_SPAN, encoded=False)
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


def _fail(answer: "Future[SegmentReply]", error: ServingError) -> None:
    with contextlib.suppress(InvalidStateError):
        answer.set_exception(error)
