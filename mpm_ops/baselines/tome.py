"""Token Merging: bipartite soft matching in every block."""

from torch import Tensor

from mpm_ops.segmenter import Segmenter

from .rivals import Matches, MergedWindows, RivalSegmenter

# By encoder width (Ti, S, B, L): about the tokens that MPM keeps, from the supplement of the MPM paper.
TOME_REDUCTIONS = {192: 30, 384: 30, 768: 30, 1024: 15}


class ToMe(RivalSegmenter):
    """A Segmenter that removes r tokens in every block, matched by the mean over heads of the attention's keys.

    Raises:
        ValueError: r < 1, or r is None and the width is none of Ti, S, B and L.

    Source: facebookresearch/ToMe@af95e4b, `tome/merge.py` and `tome/patch/timm.py`.
    """

    proportional = True

    def __init__(self, model: Segmenter, *, r: int | None = None) -> None:
        super().__init__(model, tuple(range(model.config.n_layers)))
        if r is None and model.config.d_model not in TOME_REDUCTIONS:
            raise ValueError(f"r: expected a number for a width of {model.config.d_model}, got None")
        self.r = TOME_REDUCTIONS[model.config.d_model] if r is None else r
        if self.r < 1:
            raise ValueError(f"r: expected an integer >= 1, got {r}")

    def merge(self, cut: int, windows: MergedWindows, keys: Tensor, grid: tuple[int, int]) -> MergedWindows:
        special, length = self.model.encoder.num_special, windows.x.shape[1]
        num_merged = min(self.r, (length - special) // 2)
        if num_merged <= 0:
            return windows
        return windows.merged(*Matches.find(keys, special).step(num_merged, length, special))
