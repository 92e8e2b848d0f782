"""One stage of one group on the device: launched without waiting, and taken over when it is through."""

from collections.abc import Callable, Mapping, Sequence

import torch

from mpm_ops import Segmenter
from mpm_ops.runtime import Runtime
from mpm_ops.stages import Stage, WindowBatch
from mpm_ops.transfers import fetch, stack

from .clock import DeviceClock
from .request import Group, Window

Times = tuple[float, float | None]  # seconds of a group on the device, and those of its merge


class Computer:
    """Launches groups on the device that a model is on.

    Args:
        model: embeds and merges.
        runtime: runs what is between.
        stages: of every schedule that windows may have.
    """

    def __init__(self, model: Segmenter, runtime: Runtime, stages: Mapping[tuple[int, ...], Sequence[Stage]]) -> None:
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
        stage = self._stages[group.lane.schedule][group.lane.stage]
        start = self._clock.mark()
        if stage.index == 0:
            batch = self._model.embed(stack([window.state for window in windows]))  # type: ignore[misc]
        else:
            batch = WindowBatch.join([window.state for window in windows])  # type: ignore[misc]
        batch = self._runtime.run_blocks(stage, batch)
        return (
            self._launch_merge(windows, batch, start) if stage.merges else self._launch_decoder(windows, batch, start)
        )

    def _launch_merge(self, windows: Sequence[Window], batch: WindowBatch, start: object) -> Callable[[], Times]:
        before_merge = self._clock.mark()
        merging = self._model.merging(batch)
        done = self._clock.mark()

        @torch.inference_mode()
        def finish() -> Times:
            states = merging().split()
            times = self._clock.seconds(start, done), self._clock.seconds(before_merge, done)
            for window, state in zip(windows, states, strict=True):
                window.state = state
                window.lengths.append(len(state.tokens.values) - self._model.encoder.num_special)
            return times

        return finish

    def _launch_decoder(self, windows: Sequence[Window], batch: WindowBatch, start: object) -> Callable[[], Times]:
        logits = self._runtime.decode(batch)
        finite = fetch(logits.isfinite().flatten(1).all(dim=1))
        maps = batch.merge_maps or (None,) * len(windows)
        done = self._clock.mark()

        @torch.inference_mode()
        def finish() -> Times:
            seconds = self._clock.seconds(start, done)  # waits: who is given logits reads them in another stream
            for window, its_logits, its_map, ok in zip(windows, logits, maps, finite().tolist(), strict=True):
                window.state, window.logits, window.merge_map, window.is_finite = None, its_logits.T, its_map, ok
            return seconds, None

        return finish
