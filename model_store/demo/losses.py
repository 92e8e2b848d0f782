"""What training minimises."""

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_STRIDE = 4  # pixels; the losses look at every fourth one


def segmentation_loss(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy, which learns fast, plus Lovász-softmax, which learns the score.

    Args:
        logits: [B, K, Gh, Gw], one per patch.
        labels: [B, H, W] class ids, K where nobody knows.
        class_weights: [K].
    """
    seen = labels[:, LABEL_STRIDE // 2 :: LABEL_STRIDE, LABEL_STRIDE // 2 :: LABEL_STRIDE]
    dense = F.interpolate(logits, size=seen.shape[1:], mode="bilinear", align_corners=False)
    unknown = logits.shape[1]
    entropy = F.cross_entropy(dense, seen, class_weights, ignore_index=unknown)
    known = seen != unknown
    return entropy + lovasz_softmax(dense.softmax(1).permute(0, 2, 3, 1)[known], seen[known])


def lovasz_softmax(probabilities: Tensor, labels: Tensor) -> Tensor:
    """A convex surrogate of 1 - mean IoU over the classes present.

    Args:
        probabilities: [P, K] of each pixel.
        labels: [P] class ids.

    Source: Berman et al., The Lovász-Softmax loss (arXiv 1705.08790), Algorithm 1.
    """
    losses = []
    for k in labels.unique().tolist():
        truth = (labels == k).float()
        errors, order = (truth - probabilities[:, k]).abs().sort(descending=True)
        truth = truth[order]
        intersection = truth.sum() - truth.cumsum(0)
        union = truth.sum() + (1 - truth).cumsum(0)
        jaccard = 1 - intersection / union
        losses.append(errors @ jaccard.diff(prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()
