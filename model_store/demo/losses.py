"""What training minimises."""

import torch
import torch.nn.functional as F
from torch import Tensor

LABEL_STRIDE = 2  # pixels; the losses look at every second row and column
LOVASZ_STRIDE = 2  # of those; sorting every pixel costs more than it teaches
TEMPERATURE = 2.0  # softens the teacher's answers, which are nearly one-hot on pictures that it has learned


def segmentation_loss(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted cross-entropy, which learns fast, plus Lovász-softmax, which learns the score.

    Args:
        logits: [B, K, Gh, Gw], of patches or finer.
        labels: [B, H, W] class ids, K where unknown; 0 is returned if all are.
        class_weights: [K].
    """
    seen = labels[:, LABEL_STRIDE // 2 :: LABEL_STRIDE, LABEL_STRIDE // 2 :: LABEL_STRIDE]
    dense = enlarge(logits, (seen.shape[1], seen.shape[2]))
    entropy = F.cross_entropy(dense, seen, class_weights, ignore_index=len(class_weights), reduction="sum")
    total = F.pad(class_weights, (0, 1))[seen].sum().clamp(min=1)
    coarse = dense[:, :, ::LOVASZ_STRIDE, ::LOVASZ_STRIDE].softmax(1)
    return entropy / total + lovasz_softmax(
        coarse.transpose(0, 1).flatten(1), seen[:, ::LOVASZ_STRIDE, ::LOVASZ_STRIDE].flatten()
    )


def lovasz_softmax(probabilities: Tensor, labels: Tensor) -> Tensor:
    """A convex surrogate of 1 - mean IoU over the classes present; the device is never waited for.

    Args:
        probabilities: [K, P] of each pixel.
        labels: [P] class ids, K where unknown.

    Source: Berman et al., The Lovász-Softmax loss (arXiv 1705.08790), Algorithm 1.
    """
    num_classes = len(probabilities)
    truth = (labels == torch.arange(num_classes, device=labels.device)[:, None]).float()
    # Unknown pixels have no error, so they sort last, where they add nothing.
    errors = (truth - probabilities).abs() * (labels < num_classes)
    errors, order = errors.sort(dim=1, descending=True)
    found = truth.gather(1, order)
    size = truth.sum(1, keepdim=True)
    jaccard = 1 - (size - found.cumsum(1)) / (size + (1 - found).cumsum(1)).clamp(min=1)
    losses = (errors * jaccard.diff(dim=1, prepend=jaccard.new_zeros(num_classes, 1))).sum(1)
    present = size[:, 0] > 0
    return (losses * present).sum() / present.sum().clamp(min=1)


def distillation_loss(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """How far the student's class probabilities are from the teacher's, as KL divergence per pixel.

    Args:
        logits: [B, K, Gh, Gw].
        teacher_logits: [B, K, H, W], finer.

    Source: Hinton et al., Distilling the knowledge in a neural network (arXiv 1503.02531), section 2.
    """
    dense = enlarge(logits, (teacher_logits.shape[2], teacher_logits.shape[3]))
    wanted = (teacher_logits / TEMPERATURE).log_softmax(1)
    reached = (dense / TEMPERATURE).log_softmax(1)
    return TEMPERATURE**2 * (wanted.exp() * (wanted - reached)).sum(1).mean()


def enlarge(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation [B, K, h, w] -> [B, K, *size] as inference does it, by two matrix products.

    Their gradient takes no atomic additions, which on a GPU would take longer than the network.
    """
    if tuple(logits.shape[2:]) == size:
        return logits
    rows, columns = (
        F.interpolate(torch.eye(own, device=logits.device)[None], size=side, mode="linear", align_corners=False)[0]
        for own, side in zip(logits.shape[2:], size, strict=True)
    )  # [h, H], [w, W]
    return rows.T @ (logits @ columns)
