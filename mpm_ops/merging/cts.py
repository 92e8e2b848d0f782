"""CTS: content-aware token sharing. A policy says which 2 x 2 patches share a token before the network sees them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mpm_ops._timm import create_model
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import Stage, WindowBatch

from .base import Merger, parameter

Policy = Callable[[Tensor], Tensor]  # normalised windows [B, 3, H, W] -> [B, S] scores of squares, row by row

# Squares that share, of how many: upstream's for windows of 512, 768 and 480 pixels, in patches of 16.
_SHARED = {256: 103, 576: 336, 225: 90}
_SHARE = 0.4  # elsewhere


@dataclass(frozen=True, kw_only=True)
class Cts(Merger):
    """Embeds the squares of 2 x 2 patches with the highest scores once, from half their resolution.

    The number is fixed: 612 patches and 103 squares of a window of 512 x 512. Attention and decoder count every token
    once, as upstream's do. Upstream trains network and policy for it, and has published neither.

    Attributes:
        policy: a file with the weights of a `PolicyNet`, read at the first merge; or "random", the same squares of
            every window; or "oracle", those whose patches the unmerged network most probably gives one class.
        score: a policy in Python, instead.
        shared: squares of a window that share; upstream's by default, or two fifths.

    Raises:
        ValueError: the network is distilled, or none that embeds pixels; or shared is negative.

    Source: tue-mps/cts-segmenter@e236188, `segm/model/efficient.py`, `vit.py` and `policy_net.py`; TRAINING.md.
    """

    name: ClassVar[str] = "cts"
    wants_windows: ClassVar[bool] = True
    decoder_counts: ClassVar[bool] = False
    policy: str = parameter(str, "random")
    shared: int = parameter(int, 0)
    score: Policy | None = None

    def __post_init__(self) -> None:
        if self.tower.network is None or self.tower.num_special != 1:
            raise ValueError("model: expected a Segmenter with one special token, as CTS does")
        if self.shared < 0:
            raise ValueError(f"shared: expected a number of squares, got {self.shared}")
        super().__post_init__()

    @property
    def cuts(self) -> tuple[int, ...]:
        return (0,)

    def launch(self, batch: WindowBatch) -> Callable[[], WindowBatch]:
        assert batch.windows is not None
        assert batch.grid is not None
        (rows, columns), network = batch.grid, self.tower.network
        assert network is not None
        if rows % 2 or columns % 2:
            raise ValueError(f"windows: expected an even number of patches each way, got {rows} x {columns}")
        num_squares = rows * columns // 4
        num_shared = self.shared or _SHARED.get(num_squares, round(_SHARE * num_squares))
        if num_shared > num_squares:
            raise ValueError(f"shared: expected at most {num_squares} squares of a window, got {num_shared}")
        sequences, maps = [], []
        for tokens, window in zip(batch.tokens.split(), network.normalized(batch.windows).split(1), strict=True):
            scores = self._scores(window, tokens, num_squares)
            chosen = scores.argsort(descending=True, stable=True)[:num_shared].sort().values
            is_shared = torch.zeros(num_squares, dtype=torch.bool, device=tokens.device)
            is_shared[chosen] = True
            patch_shares = is_shared.view(rows // 2, 1, columns // 2, 1).expand(-1, 2, -1, 2).reshape(-1)
            square = torch.arange(num_squares, device=tokens.device).view(rows // 2, 1, columns // 2, 1)
            square = square.expand(-1, 2, -1, 2).reshape(-1)
            num_alone = rows * columns - 4 * num_shared
            alone = (~patch_shares).cumsum(0) - 1
            maps.append(torch.where(patch_shares, num_alone + is_shared.cumsum(0)[square] - 1, alone))
            own = network.encoder.embed_squares(window)[0, chosen].to(tokens.dtype)
            sequences.append(torch.cat([tokens[:1], tokens[1:][~patch_shares], own]))
        merged = WindowBatch(PackedTokens.pack(sequences), torch.stack(maps))
        return lambda: merged

    def _scores(self, window: Tensor, tokens: Tensor, num_squares: int) -> Tensor:
        """[S] for a window [1, 3, H, W] and its embedded tokens."""
        if self.score is not None:
            scores = self.score(window)
        elif self.policy == "random":
            scores = torch.rand(1, num_squares, generator=torch.Generator().manual_seed(0)).to(tokens.device)
        elif self.policy == "oracle":
            scores = self._agreement(window, tokens)
        else:
            scores = load_policy(self.policy).to(window.device)(window)
        if scores.shape != (1, num_squares):
            raise ValueError(f"policy: expected scores of {num_squares} squares, got {list(scores.shape)}")
        return scores[0]

    def _agreement(self, window: Tensor, tokens: Tensor) -> Tensor:
        """[1, S], by log-probability that the unmerged network gives all patches of a square one class."""
        network: Any = self.tower.network
        x = tokens.to(network.encoder.pos_embed.dtype)
        whole = Stage(index=0, parts=range(2 * self.tower.num_blocks))
        logits = network.decode(network.run_blocks(whole, WindowBatch(PackedTokens.from_batch(x[None]))))
        grid = (-(-window.shape[2] // network.config.patch_size) // 2, 2, -1, 2, logits.shape[2])
        return logits[0].float().log_softmax(dim=-1).view(grid).sum(dim=(1, 3)).logsumexp(dim=-1).flatten()[None]


class PolicyNet(nn.Module):
    """EfficientNet-Lite0 that tells of every 32 x 32 pixels whether they show one class; upstream's architecture."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_model("efficientnet_lite0", pretrained=False, features_only=True)
        self.head = nn.Conv2d(320, 2, 1)

    @torch.inference_mode()
    def forward(self, windows: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, S], logarithms of the odds."""
        different, same = self.head(self.backbone(windows.float())[-1]).flatten(2).unbind(1)
        return same - different


@lru_cache(maxsize=4)
def load_policy(path: str) -> PolicyNet:
    """A policy in evaluation mode from its own file, or from a CTS checkpoint that holds one.

    Raises:
        FileNotFoundError, CheckpointError: see `read_checkpoint`; or its weights are others.
    """
    from mpm_ops.models.files import load_strictly, read_checkpoint  # which itself needs mergers

    checkpoint = read_checkpoint(Path(path), ["backbone.conv_stem.weight"])
    policy = PolicyNet()
    own = {name: weight for name, weight in checkpoint.weights.items() if name.startswith(("backbone.", "head."))}
    load_strictly(policy, own, checkpoint.path, "an EfficientNet-Lite0 policy")
    return policy.eval()
