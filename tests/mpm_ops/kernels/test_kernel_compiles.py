"""Every kernel compiles for real GPUs, fits their shared memory and hardly spills registers: no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}

COMPILE = """
import subprocess, sys, tempfile
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from mpm_ops.kernels import attention, labels, merging, nearest, norms

capability = int(sys.argv[1])
warps, stages = nearest.tiling(capability, int(sys.argv[2]))
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pointers = {
    "p_x": "*bf16", "p_merged": "*bf16", "p_high": "*fp16", "p_low": "*fp16", "p_hidden": "*fp32",
    "p_best": "*i64", "p_map": "*i64",
    "p_tokens": "*fp32", "p_row_weights": "*fp32", "p_column_weights": "*fp32", "p_labels": "*u8",
    "p_rest": "*bf16", "p_weight": "*bf16", "p_sum": "*bf16", "p_normed": "*bf16", "eps": "fp32",
    "p_qkv": "*bf16", "p_out": "*bf16", "scale": "fp32",
}
cases = [
    (nearest._units, {"scale": 1024.0, "block": 8, "block_width": 512}, {}),
    (nearest._nearest_tiles, {"tile": nearest.TILE, "depth": nearest.DEPTH},
     {"num_warps": warps, "num_stages": stages}),
    (merging._partners, {"is_aligned": True, "block": merging.BLOCK}, {}),
    (merging._partners, {"is_aligned": False, "block": merging.BLOCK}, {}),
    (merging._positions, {"chunk": merging.CHUNK}, {}),
    (merging._average, {"block": 8, "block_width": 512}, {}),
    (norms._add_norm, {"adds": True, "rows": 8, "block_width": 256}, {"num_warps": norms.WARPS}),
    (norms._add_norm, {"adds": True, "rows": 2, "block_width": 1024}, {"num_warps": norms.WARPS}),
    (attention._attend,
     {"biased": True, "head_dim": 64, "block_m": attention.BLOCK_M, "block_n": attention.BLOCK_N},
     {"num_warps": attention.WARPS, "num_stages": attention.STAGES}),
    (labels._label_pixels, {"block": 16, "classes": labels.CLASSES}, {"num_warps": labels.WARPS}),
    (labels._label_pixels, {"block": labels.PIXELS, "classes": labels.CLASSES}, {"num_warps": labels.WARPS}),
]
for kernel, constants, options in cases:
    pointers["p_bias"] = "*fp32" if kernel is attention._attend else "*bf16"
    types = {}
    for name in kernel.arg_names:
        plain = pointers.get(name, "*i32" if name.startswith("p_") else "i32")
        types[name] = "constexpr" if name in constants else plain
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name in ("width", "padded_width")]
    aligned = [name for name in aligned if name not in kernel.do_not_specialize]
    place = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(place(name),): value for name, value in constants.items()},
        attrs={(place(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants},
    )
    built = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    stack = usage.partition("STACK:")[2].split()[0]
    wgmma = int("wgmma.mma_async" in built.asm["ptx"])
    print(kernel.__name__, built.metadata.shared, stack, wgmma, flush=True)
"""


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_compiles(capability: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    script = tmp_path / "build.py"
    script.write_text(COMPILE)  # the language reads its kernels' sources from files
    limit = SHARED_BYTES[capability]
    command = [sys.executable, str(script), str(capability), str(limit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [line.split() for line in done.stdout.splitlines()]
    assert len(kernels) >= 11
    for name, shared, stack, wgmma in kernels:
        assert int(shared) <= limit, name
        assert int(stack) <= (8 if capability == 100 else 0), f"{name} spills {stack} bytes"
        if name in ("_nearest_tiles", "_attend") and capability == 90:
            assert wgmma == "1", "Hopper's tensor cores are idle"


COUNT = """
from collections import defaultdict
import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature
from mpm_ops.kernels import labels, merging
from mpm_ops.labels import _axes_on
from mpm_ops.windows import InferenceConfig, plan_windows

backend = make_backend(GPUTarget("cuda", 90, 32))
builds = defaultdict(set)

def count(self, *arguments, grid, warmup, **options):
    # What triton would look up, and compile where it finds nothing.
    bound, specialization, options = create_function_from_signature(self.signature, self.params, backend)(
        *arguments, **options)
    builds[self.__name__].add(compute_cache_key({}, specialization, options))

JITFunction.run = count
official = InferenceConfig(im_size=512, max_ratio=4, window_size=512, window_stride=512, normalization="vit")
random = np.random.default_rng(0)
sizes = [(512, 512), (500, 512), (512, 513), (16, 16), (1, 1), (333, 1000), (1080, 1920), (2160, 3840), (720, 1281)]
sizes += [tuple(random.integers(1, 3000, 2).tolist()) for _ in range(40)]
for height, width in sizes:
    if max(height, width) > 8 * min(height, width):
        continue
    plan = plan_windows(height, width, official)
    rows, columns, widest = _axes_on(plan, (32, 32), 16, torch.device("cpu"))
    logits = torch.zeros(1, len(plan.tops), len(plan.lefts), 32, 32, 150)
    labels.label_pixels(logits, rows, columns, widest)
for lengths in [(1025,), (1024,), (1025, 1025), (600, 593, 701), (16,), (17,), (1025,) * 16, (333, 222)]:
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    merging.merge_packed(torch.zeros(sum(lengths), 384, dtype=torch.bfloat16), bounds, max(lengths), 1, 1)
for name, keys in builds.items():
    print(name, len(keys))
"""


def test_traffic_compiles_nothing_anew(tmp_path: Path) -> None:
    """Sizes of pictures and groups are plain arguments: triton would compile again where one is 1 or divides by 16."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[3])
    done = subprocess.run([sys.executable, "-c", COUNT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    builds = {name: int(number) for name, number in map(str.split, done.stdout.splitlines())}
    assert builds.pop("_label_pixels") <= 4, "one for each number of pixels that it takes at once"
    assert set(builds) == {"_units", "_nearest_tiles", "_partners", "_positions", "_average"}
    assert set(builds.values()) == {1}
