"""One stage of one group on the device: launched without waiting, and taken over when it is through."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mpm_ops import Segmenter
from mpm_ops.runtime import Runtime
from mpm_ops.stages import Decoded, Stage, WindowBatch
from mpm_ops.transfers import fetch, stack
from mpm_ops.windows import normalize_windows

from .clock import DeviceClock
from .request import Group, Window

Times = tuple[float, float | None]  # seconds of a group on the device, and of its merge where that runs on its own
Launch = Callable[[Group], Callable[[], Times]]  # see `Computer.launch`


class Computer:
    """Launches groups on the device that a model is on.

    Args:
        model: embeds and merges.
        runtime: runs what is between.
        stages: of every merger that windows may have, by its name in lanes.
    """

    def __init__(self, model: Segmenter, runtime: Runtime, stages: Mapping[str, Sequence[Stage]]) -> None:
        self._model = model
        self._runtime = runtime
        self._stages = stages
        self._clock = DeviceClock(model.encoder.pos_embed.device)

    @torch.inference_mode()
    def launch(self, group: Group) -> Callable[[], Times]:
        """Launch a group and wait for nothing on a GPU; windows stay as they are, so it can be launched again.

        Returns:
            What waits for the group, and for nothing launched behind it, then keeps each window's outcome with it
            and gives the group's own seconds. To be called once.
        """
        windows = group.windows
        stage = self._stages[group.lane.merger][group.lane.stage]
        start = self._clock.mark()
        states = [window.state for window in windows]
        given = WindowBatch.join(states) if stage.index else self._stack(states)  # type: ignore[arg-type]
        merge_starts: list[object] = []
        padded_before = self._runtime.padding_tokens
        launched = self._model.launch(
            stage, given, self._runtime, before_merge=lambda: merge_starts.append(self._clock.mark())
        )
        group.padding_tokens = self._runtime.padding_tokens - padded_before
        if isinstance(launched, Decoded):
            maps = given.merge_maps if isinstance(given, WindowBatch) else None
            return self._decoded(windows, launched, maps or (None,) * len(windows), start)
        return self._merging(windows, launched, start, merge_starts)

    def _stack(self, windows: Sequence[Tensor]) -> Tensor:
        """Windows of one group; normalised where some come as bytes and others don't."""
        if len({window.dtype for window in windows}) == 1:
            return stack(windows)
        normalization = self._model.inference.normalization
        return stack([normalize_windows(window[None], normalization)[0] for window in windows])

    def _merging(
        self,
        windows: Sequence[Window],
        merging: Callable[[], WindowBatch],
        start: object,
        merge_starts: Sequence[object],
    ) -> Callable[[], Times]:
        done = self._clock.mark()
        special = self._model.encoder.num_special

        @torch.inference_mode()
        def finish() -> Times:
            merged = merging()
            seconds = self._clock.seconds(start, done)
            merge_seconds = self._clock.seconds(merge_starts[0], done) if merge_starts else None
            for i, (window, state) in enumerate(zip(windows, merged.split(), strict=True)):
                window.state = state
                window.lengths.append(state.length - special)
                if window.picture.keeps_maps and merged.merge_maps is not None:
                    window.merge_maps.append(merged.merge_maps[i].cpu())
            return seconds, merge_seconds

        return finish

    def _decoded(
        self, windows: Sequence[Window], decoded: Decoded, maps: Sequence[Tensor | None], start: object
    ) -> Callable[[], Times]:
        finite = fetch(decoded.is_finite)
        done = self._clock.mark()

        @torch.inference_mode()
        def finish() -> Times:
            seconds = self._clock.seconds(start, done)  # waits: who is given logits reads them in another stream
            logits, oks = decoded.logits.mT.unbind(), finite().tolist()
            for window, its_logits, its_map, ok in zip(windows, logits, maps, oks, strict=True):
                window.state, window.logits, window.merge_map, window.is_finite = None, its_logits, its_map, ok
            return seconds, None

        return finish
