"""The unmerged network over [B, N, D], as one writes it for batches of equal length: what torch.compile is given."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpm_ops.decoders import MaskTransformer
from mpm_ops.segmenter import Segmenter


class DenseSegmenter(nn.Module):
    """A Segmenter's own modules without packing, merging or runtimes.

    Args:
        model: with a mask decoder, for windows of its image size.
    """

    def __init__(self, model: Segmenter) -> None:
        super().__init__()
        assert isinstance(model.decoder, MaskTransformer)
        self.encoder = model.encoder
        self.decoder = model.decoder

    def forward(self, windows: Tensor) -> Tensor:
        """[B, 3, H, W] normalised windows -> [B, N, K] logits."""
        encoder, decoder = self.encoder, self.decoder
        patches = encoder.patch_embed["proj"](windows).flatten(2).transpose(1, 2)
        x = torch.cat([encoder.cls_token.expand(len(windows), -1, -1), patches], dim=1) + encoder.pos_embed
        x = decoder.proj_dec(encoder.norm(encoder.blocks(x))[:, encoder.num_special :])
        x = torch.cat([x, decoder.cls_emb.expand(len(windows), -1, -1)], dim=1)
        x = decoder.decoder_norm(decoder.blocks(x))
        found = F.normalize(x[:, : -decoder.n_cls] @ decoder.proj_patch, dim=-1)
        classes = F.normalize(x[:, -decoder.n_cls :] @ decoder.proj_classes, dim=-1)
        return decoder.mask_norm(found @ classes.transpose(1, 2))
