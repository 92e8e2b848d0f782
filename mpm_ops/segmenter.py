"""The Segmenter: a ViT encoder with Mutual Pair Merging, a decoder, and the official inference around them."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attention import run_parts
from .decoders import DecoderLinear, MaskTransformer, decodes_together
from .encoder import HEAD_DIM, LAYER_NORM_EPS, Encoder
from .labels import label_map
from .merge_gpu import image_starts, packed_rows
from .merging import Merger, Mpm, Tower
from .packed import PackedTokens
from .runtime import Runtime
from .runtime.eager import TorchRuntime
from .stages import Decoded, Stage, WindowBatch
from .windows import InferenceConfig, cut_windows, normalize_windows, plan_windows

DECODERS = ("mask_transformer", "linear")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmenterConfig:
    """The shape of a Segmenter, as `variant.yml` gives it under `net_kwargs`.

    The last two are not upstream's: `norm_eps` of the encoder's norms, and how `positions` are resized, bilinear or
    bicubic.
    """

    image_size: tuple[int, int]
    patch_size: int
    d_model: int
    n_heads: int
    n_layers: int
    n_cls: int
    decoder: str = "mask_transformer"
    decoder_layers: int = 2
    distilled: bool = False
    drop_path_rate: float = 0.0
    norm_eps: float = LAYER_NORM_EPS
    positions: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("patch_size", "d_model", "n_heads", "n_layers", "n_cls", "decoder_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if not isinstance(self.drop_path_rate, int | float) or not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate: expected a number in [0, 1), got {self.drop_path_rate!r}")
        if not isinstance(self.norm_eps, float) or not 0 < self.norm_eps < 1:
            raise ValueError(f"norm_eps: expected a number in (0, 1), got {self.norm_eps!r}")
        if self.positions not in ("bilinear", "bicubic"):
            raise ValueError(f"positions: expected bilinear or bicubic, got {self.positions!r}")
        if len(self.image_size) != 2 or any(
            side < self.patch_size or side % self.patch_size for side in self.image_size
        ):
            raise ValueError(
                f"image_size: expected multiples of the patch size {self.patch_size}, got {self.image_size}"
            )
        if self.d_model != self.n_heads * HEAD_DIM:
            raise ValueError(f"d_model: expected n_heads x {HEAD_DIM} = {self.n_heads * HEAD_DIM}, got {self.d_model}")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder: expected one of {', '.join(DECODERS)}, got {self.decoder!r}")


class Segmenter(nn.Module):
    """A semantic segmentation network whose tokens merge on the way.

    Attributes:
        config: the network's shape.
        inference: how pictures become windows.
        merger: how tokens merge, and so where the network is cut; may be replaced.
        runtime: what blocks and decoder run on, see `make_runtime`; by default this module's own operators, as suits
            the device that it is on when it is first asked for.
    """

    def __init__(
        self,
        config: SegmenterConfig,
        inference: InferenceConfig,
        *,
        schedule: Sequence[int] = (),
        align: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.inference = inference
        self.merger: Merger = self.mpm(schedule, align)
        self.encoder = Encoder(
            image_size=config.image_size,
            patch_size=config.patch_size,
            d_model=config.d_model,
            n_heads=config.n_heads,
            n_layers=config.n_layers,
            distilled=config.distilled,
            drop_path_rate=config.drop_path_rate,
            norm_eps=config.norm_eps,
            resize_mode=config.positions,
        )
        self.decoder: DecoderLinear | MaskTransformer
        if config.decoder == "linear":
            self.decoder = DecoderLinear(n_cls=config.n_cls, d_encoder=config.d_model)
        else:
            self.decoder = MaskTransformer(
                n_cls=config.n_cls, d_encoder=config.d_model, n_layers=config.decoder_layers
            )
        self._runtime: Runtime | None = None

    @property
    def tower(self) -> Tower:
        """What a merger has to know of the encoder."""
        config = self.config
        return Tower(num_blocks=config.n_layers, width=config.d_model, num_special=2 if config.distilled else 1)

    def mpm(self, schedule: Sequence[int], align: int = 1) -> Mpm:
        """The paper's merger for this network, see `Mpm`."""
        return Mpm(tower=self.tower, schedule=tuple(schedule), align=align)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The network, cut where its merger merges."""
        return self.merger.stages

    @property
    def schedule(self) -> tuple[int, ...]:
        """Blocks before which MPM merges; empty where it does not."""
        return self.merger.schedule if isinstance(self.merger, Mpm) else ()

    @property
    def align(self) -> int:
        """See `merge_tokens`; 1 where MPM does not merge."""
        return self.merger.align if isinstance(self.merger, Mpm) else 1

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:  # only now is it sure where the weights are, and that nobody brings another
            self._runtime = TorchRuntime(self, attention="auto" if self.encoder.pos_embed.is_cuda else None)
        return self._runtime

    @runtime.setter
    def runtime(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def __deepcopy__(self, memo: dict[int, Any]) -> "Segmenter":
        """A copy without the runtime, which runs the weights of this one."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__ | {"_runtime": None}, memo))
        return twin

    # The steps of the network, one by one, for whoever groups windows between them.

    def embed(self, windows: Tensor) -> WindowBatch:
        """Tokens of windows.

        Args:
            windows: float [B, 3, H, W], normalised; or uint8 RGB [B, H, W, 3], as cut from a fitted picture, which
                give the same numbers where the frame is not resized once more (see `cut_windows`).
        """
        if windows.dtype == torch.uint8:
            windows = normalize_windows(windows, self.inference.normalization)
        size = self.config.patch_size
        grid = (-(-windows.shape[2] // size), -(-windows.shape[3] // size))
        return WindowBatch(self.encoder.embed(windows), grid=grid)

    def launch(
        self,
        stage: Stage,
        given: Tensor | WindowBatch,
        runtime: Runtime | None = None,
        *,
        before_merge: Callable[[], None] = lambda: None,
    ) -> Callable[[], WindowBatch] | Decoded:
        """Launch one stage from its input to its end and wait for nothing on a GPU.

        Args:
            stage: of a merger's `stages`.
            given: windows for the first stage, see `embed`; what the stage before gave for others.
            runtime: what runs it; this model's own by default.
            before_merge: called between blocks and merge, unless one graph holds both.

        Returns:
            Of a stage that merges, what waits for the device and gives the merged windows; of the last one, logits.
        """
        return (runtime or self.runtime).launch(stage, given, before_merge=before_merge)

    def run_blocks(self, stage: Stage, batch: WindowBatch) -> WindowBatch:
        """Run the encoder blocks of one stage."""
        key_bias = batch.log_sizes(self.encoder.num_special) if stage.attention_counts else None
        tokens, keys = self.run_parts(stage.parts, batch.tokens, key_bias, wants_keys=stage.wants_keys)
        return replace(batch, tokens=tokens, keys=keys)

    def run_parts(
        self, parts: range, tokens: PackedTokens, key_bias: Tensor | None = None, *, wants_keys: bool = False
    ) -> tuple[PackedTokens, Tensor | None]:
        """Run halves of encoder blocks; see `mpm_ops.attention.run_parts`."""
        blocks: Any = self.encoder.blocks
        return run_parts(blocks, parts, tokens, key_bias, wants_keys=wants_keys)

    def merge(self, batch: WindowBatch) -> WindowBatch:
        """Merge the image tokens of every window; special tokens are never touched."""
        return self.merger.launch(batch)()

    def decode(self, batch: WindowBatch, *, counts: bool = True) -> Tensor:
        """Logits of every patch, [B, N, K]: decoded on merged tokens, copied back last.

        Args:
            counts: attention counts each token as often as the patches it stands for.
        """
        rows = None
        if batch.maps is not None:
            starts = image_starts(batch.tokens.cu_seqlens, self.encoder.num_special)[: len(batch.maps)]
            rows = packed_rows(batch.maps, starts)
        logits = self.decode_rows(batch.tokens, rows, counts=counts)
        return logits.unflatten(0, (len(batch.tokens.lengths), -1))

    def decode_rows(self, tokens: PackedTokens, rows: Tensor | None, *, counts: bool = True) -> Tensor:
        """Logits of every image token, or of those that rows point to.

        Args:
            tokens: packed tokens, special tokens first.
            rows: int64, for each patch its row among all image tokens, see `packed_rows`; None where nothing merged.
            counts: see `decode`.

        Returns:
            [T - B * special, K], or [len(rows), K].
        """
        if rows is None:
            return self.score(tokens)
        if not counts:
            return self.score(tokens)[rows]
        # Nothing points to tokens that only fill a shape up; log(0) would be a bias of minus infinity.
        num_image = len(tokens.values) - len(tokens.lengths) * self.encoder.num_special
        sizes = rows.new_zeros(num_image).scatter_add_(0, rows, torch.ones_like(rows)).clamp_(min=1)
        return self.score(tokens, sizes)[rows]

    def score(self, tokens: PackedTokens, sizes: Tensor | None = None) -> Tensor:
        """Logits of every image token: final norm, special tokens dropped, decoder.

        Args:
            tokens: packed tokens, special tokens first.
            sizes: [T - B * special], see the decoders.
        """
        special = self.encoder.num_special
        normed = tokens.with_values(self.encoder.norm(tokens.values))
        if decodes_together(normed.values):
            image = normed.without_first(special)
        else:
            image = PackedTokens.pack([sequence[special:] for sequence in normed.split()])
        return self.decoder(image, sizes)

    def forward(self, windows: Tensor) -> Tensor:
        """[B, 3, H, W] normalised windows -> [B, K, Gh, Gw] logits, one per patch."""
        given: Tensor | WindowBatch = windows
        for stage in self.stages:
            launched = self.launch(stage, given)
            if not isinstance(launched, Decoded):
                given = launched()
        assert isinstance(launched, Decoded)
        grid_height = -(-windows.shape[2] // self.config.patch_size)
        return launched.logits.transpose(1, 2).unflatten(2, (grid_height, -1))

    @torch.inference_mode()
    def window_logits(self, windows: Tensor) -> Tensor:
        """Class logits of windows, one vector per patch.

        Args:
            windows: float [B, 3, H, W], normalised as the checkpoint expects; H and W are padded
                with zeros to a multiple of the patch size P.

        Returns:
            [B, K, ceil(H/P), ceil(W/P)].

        Raises:
            ValueError: windows is not a float [B, 3, H, W] tensor with at least one window.
        """
        if windows.ndim != 4 or windows.shape[1] != 3 or 0 in windows.shape or not windows.is_floating_point():
            raise ValueError(f"windows: expected float [B, 3, H, W], got {windows.dtype} {list(windows.shape)}")
        return self(windows)

    def segment(self, image: np.ndarray, *, window_batch: int = 4) -> np.ndarray:
        """Label every pixel of a picture, as Segmenter's official single-scale inference does.

        Args:
            image: uint8 RGB [H, W, 3] of any size.
            window_batch: windows computed together; memory, not the answer, depends on it.

        Returns:
            [H, W] class ids, uint8 (uint16 from 257 classes on).

        Raises:
            ValueError: image is not a uint8 RGB array.
            TooManyWindowsError: the picture is so elongated that it exceeds `max_windows_per_request`.
        """
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape or image.dtype != np.uint8:
            raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
        plan = plan_windows(image.shape[0], image.shape[1], self.inference)
        device = self.encoder.pos_embed.device
        windows = cut_windows(image, plan, self.inference)
        logits = torch.cat([self.window_logits(part.to(device)) for part in windows.split(window_batch)])
        return label_map(logits, plan, self.config.patch_size).labels
