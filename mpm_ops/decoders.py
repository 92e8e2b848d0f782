"""Segmenter's two decoders, on packed tokens that may stand for several patches each.

Neither decoder knows positions, so copies of one merged token stay equal through all of it. Running
on the merged tokens, each counted as often as the patches it stands for, and copying the logits back
afterwards gives what copying the tokens back first would give.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import block_forward
from .encoder import HEAD_DIM, LAYER_NORM_EPS, make_blocks
from .packed import PackedTokens


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
        x = self._with_classes(tokens.with_values(self.proj_dec(tokens.values)), self.cls_emb[0])
        key_bias = None
        if sizes is not None:
            log_sizes = tokens.with_values(sizes.to(torch.promote_types(x.values.dtype, torch.float32)).log())
            key_bias = self._with_classes(log_sizes, log_sizes.values.new_zeros(self.n_cls)).values
        for block in self.blocks:
            x = block_forward(block, x, key_bias)
        x = x.with_values(self.decoder_norm(x.values))

        masks = []
        for sequence in x.split():
            patches = F.normalize(sequence[: -self.n_cls] @ self.proj_patch, dim=-1, eps=0.0)
            classes = F.normalize(sequence[-self.n_cls :] @ self.proj_classes, dim=-1, eps=0.0)
            masks.append(patches @ classes.T)
        return self.mask_norm(torch.cat(masks))

    @staticmethod
    def _with_classes(tokens: PackedTokens, classes: Tensor) -> PackedTokens:
        """Append the same K rows to every sequence."""
        return PackedTokens.pack([torch.cat([sequence, classes]) for sequence in tokens.split()])
