"""timm loads beside any build of torch: operators that torchvision lacks are defined, those it has are not."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TIMM = {"timm/layers": "Attention", "timm/models/vision_transformer": "Block, VisionTransformer"}
NMS = "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
FAKE = {
    "complete": f'import torch\nkept = torch.library.Library("torchvision", "DEF")\nkept.define("{NMS}")\n',
    "lacking": "import torch\n\n\n@torch.library.register_fake('torchvision::nms')\ndef nms(*_):\n    return None\n",
    "broken": "raise RuntimeError('another reason')\n",
}


def imported(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What a process makes of `mpm_ops._timm` beside such a torchvision, with a timm that imports it."""
    (folder / "torchvision.py").write_text(FAKE[kind])
    for package, names in TIMM.items():
        (folder / package).mkdir(parents=True)
        code = "import torchvision\n" + "".join(f"class {name}: ...\n" for name in names.split(", "))
        (folder / package / "__init__.py").write_text(code)
    (folder / "timm" / "__init__.py").write_text("def create_model(): ...\n")
    (folder / "timm" / "models" / "__init__.py").touch()
    module = ROOT / "mpm_ops" / "_timm.py"
    program = (
        f"import sys, importlib.util; sys.path.insert(0, {str(folder)!r})\n"
        f"spec = importlib.util.spec_from_file_location('ours', {str(module)!r})\n"
        "ours = importlib.util.module_from_spec(spec); spec.loader.exec_module(ours)\n"
        "import torch\n"
        "print(ours._library is None, bool(torch._C._jit_get_schemas_for_operator('torchvision::nms')))\n"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("kind", "untouched"), [("complete", True), ("lacking", False)])
def test_schemas_are_defined_where_they_are_missing(kind: str, untouched: bool, tmp_path: Path) -> None:
    done = imported(kind, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{untouched} True\n"


def test_another_failure_is_not_hidden(tmp_path: Path) -> None:
    done = imported("broken", tmp_path)
    assert done.returncode == 1
    assert "RuntimeError: another reason" in done.stderr
