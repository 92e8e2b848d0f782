"""Segmenter's two decoders, on packed tokens that may stand for several patches each.

Neither decoder knows positions, so copies of one merged token stay equal through all of it. Running
on the merged tokens, each counted as often as the patches it stands for, and copying the logits back
afterwards gives what copying the tokens back first would give.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import run_blocks
from .encoder import HEAD_DIM, LAYER_NORM_EPS, make_blocks
from .packed import PackedTokens, places


def decodes_together(values: Tensor) -> bool:
    """Whether all windows are scored at once, rather than one by one, which on a CPU keeps every bit of a window
    independent of its mates."""
    return values.is_cuda


class DecoderLinear(nn.Module):
    """One linear layer per token."""

    def __init__(self, *, n_cls: int, d_encoder: int) -> None:
        super().__init__()
        self.head = nn.Linear(d_encoder, n_cls)

    def forward(self, tokens: PackedTokens, sizes: Tensor | None = None) -> Tensor:
        """[T, D] tokens -> [T, K] logits; sizes make no difference to a layer without attention."""
        return self.head(tokens.values)


class MaskTransformer(nn.Module):
    """Class embeddings attend with the patches; logits are cosines between the two."""

    def __init__(self, *, n_cls: int, d_encoder: int, n_layers: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.n_cls = n_cls
        self.cls_emb = nn.Parameter(torch.zeros(1, n_cls, d_encoder))
        self.proj_dec = nn.Linear(d_encoder, d_encoder)
        self.blocks = make_blocks(d_encoder, d_encoder // HEAD_DIM, n_layers, drop_path_rate)
        self.decoder_norm = nn.LayerNorm(d_encoder, eps=LAYER_NORM_EPS)
        self.proj_patch = nn.Parameter(torch.zeros(d_encoder, d_encoder))
        self.proj_classes = nn.Parameter(torch.zeros(d_encoder, d_encoder))
        self.mask_norm = nn.LayerNorm(n_cls, eps=LAYER_NORM_EPS)

    def forward(self, tokens: PackedTokens, sizes: Tensor | None = None) -> Tensor:
        """Score every token against every class.

        Args:
            tokens: [T, D] packed image tokens, special tokens excluded.
            sizes: [T], how many patches each token stands for; None means one each.

        Returns:
            [T, K] logits.
        """
        projected = self.proj_dec(tokens.values)
        log_sizes = None
        if sizes is not None:
            log_sizes = sizes.to(torch.promote_types(projected.dtype, torch.float32)).log()
        layout: _Together | _OneByOne = _OneByOne(tokens, self.n_cls)
        if decodes_together(projected):
            layout = _Together.of(tokens, self.n_cls)
        x = layout.append(projected, self.cls_emb[0])
        key_bias = None
        if log_sizes is not None:
            key_bias = layout.append(log_sizes, log_sizes.new_zeros(self.n_cls)).values
        x = run_blocks(self.blocks, x, key_bias, self.decoder_norm)
        return self.mask_norm(layout.score(x.values, self.proj_patch, self.proj_classes))


@dataclass(frozen=True, slots=True)
class _OneByOne:
    """Patches of each window with K class rows behind them."""

    tokens: PackedTokens
    num_classes: int

    def append(self, rows: Tensor, classes: Tensor) -> PackedTokens:
        return PackedTokens.pack([torch.cat([own, classes]) for own in rows.split(self.tokens.lengths)])

    def score(self, values: Tensor, proj_patch: Tensor, proj_classes: Tensor) -> Tensor:
        """[T, K] cosines of every patch with the classes of its window."""
        masks = []
        for sequence in values.split([length + self.num_classes for length in self.tokens.lengths]):
            patches = _unit(sequence[: -self.num_classes] @ proj_patch)
            masks.append(patches @ _unit(sequence[-self.num_classes :] @ proj_classes).T)
        return torch.cat(masks)


@dataclass(frozen=True, slots=True)
class _Together:
    """The same for all windows at once, by indices that the device computes from where sequences start.

    Attributes:
        lengths: of the sequences with their classes.
        bounds: [B + 1] int32, where those start.
        source: [T + B * K], the row of patches, with K class rows behind them all, that goes into each row.
        patches: [T], rows of the patches among those of the sequences with their classes.
        classes: [B, K], rows of the classes.
        padded: [B, L], the patch in each place of each sequence; where it has no more, any.
        unpadded: [T], the place of each patch in a flat `padded`.
    """

    lengths: tuple[int, ...]
    bounds: Tensor
    source: Tensor
    patches: Tensor
    classes: Tensor
    padded: Tensor
    unpadded: Tensor

    @classmethod
    def of(cls, tokens: PackedTokens, num_classes: int) -> "_Together":
        starts, num_tokens, longest = tokens.cu_seqlens, len(tokens.values), tokens.max_seqlen
        lengths = tuple(length + num_classes for length in tokens.lengths)
        number = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
        bounds = starts + num_classes * number
        sequence, place = places(bounds, sum(lengths))
        own = starts.diff()[sequence]
        source = torch.where(place < own, starts[sequence] + place, num_tokens + place - own)
        home, at = places(starts, num_tokens)
        columns = torch.arange(longest, device=starts.device)
        return cls(
            lengths,
            bounds,
            source,
            home * num_classes + torch.arange(num_tokens, device=starts.device),
            (bounds[1:, None] - num_classes) + torch.arange(num_classes, device=starts.device),
            (starts[:-1, None] + columns).clamp(max=max(num_tokens - 1, 0)),
            home * longest + at,
        )

    def append(self, rows: Tensor, classes: Tensor) -> PackedTokens:
        return PackedTokens(torch.cat([rows, classes])[self.source], self.lengths, self.bounds)

    def score(self, values: Tensor, proj_patch: Tensor, proj_classes: Tensor) -> Tensor:
        """[T, K] cosines of every patch with the classes of its window."""
        patches = _unit(values[self.patches] @ proj_patch)
        classes = _unit(values[self.classes] @ proj_classes)  # [B, K, D]
        return torch.bmm(patches[self.padded], classes.mT).flatten(0, 1)[self.unpadded]


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=-1, eps=0.0)
