"""Operations of a network at any numbers of tokens, as torch's own counter has them."""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from mpm_ops.attention import use_attention
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime.eager import with_same_weights
from mpm_ops.segmenter import Segmenter
from mpm_ops.stages import Stage


class Arithmetic:
    """Counts matrix products and convolutions, as torch's profiler does: two for a multiplication and a sum.

    Every part of a network takes a square polynomial of its tokens: three counts, of few tokens, tell all.
    Finding what merges is not counted: its time is measured.
    """

    def __init__(self, model: Segmenter) -> None:
        self._model = with_same_weights(model)
        use_attention(self._model, "plain")
        self._special = model.encoder.num_special
        self.part = lru_cache(None)(self._part)

    def window(self, stages: Sequence[Stage], lengths: Sequence[int], *, decoding: int | None = None) -> int:
        """Operations of a window, from its pixels to logits.

        Args:
            stages: of a merger.
            lengths: image tokens of the window in each stage; the first one's are its patches, in a square.
            decoding: image tokens that are decoded, those of the last stage if None: decoding all patches is the
                paper's order, which gives the same logits.
        """
        total = self._embedding + self.decoder(lengths[-1] if decoding is None else decoding)
        for stage, length in zip(stages, lengths, strict=True):
            total += sum(self.part(part)(length) for part in stage.parts)
        return total

    @cached_property
    def _embedding(self) -> int:
        side = self._model.inference.window_size
        return _counted(lambda: self._model.encoder.embed(self._model.encoder.pos_embed.new_zeros(1, 3, side, side)))

    @cached_property
    def decoder(self) -> Callable[[int], int]:
        """Operations from image tokens to their logits."""
        return _of_length(lambda length: self._model.score(self._tokens(length)))

    def _part(self, part: int) -> Callable[[int], int]:
        """Operations of half a block, see `run_parts`, on so many image tokens."""
        return _of_length(lambda length: self._model.run_parts(range(part, part + 1), self._tokens(length)))

    def _tokens(self, length: int) -> PackedTokens:
        length += self._special
        return PackedTokens(self._model.encoder.pos_embed.new_zeros(length, self._model.config.d_model), (length,))


def _counted(compute: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        compute()
    return int(counter.get_total_flops())


def _of_length(compute: Callable[[int], object]) -> Callable[[int], int]:
    """The square polynomial through three counts, in whole numbers."""
    f1, f2, f3 = (_counted(partial(compute, length)) for length in (1, 2, 3))
    return lambda n: f1 + (n - 1) * (f2 - f1) + (n - 1) * (n - 2) // 2 * (f3 - 2 * f2 + f1)
