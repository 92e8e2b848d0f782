#!/bin/sh
# finish.sh torchserve|triton: the project's wheel, bill of materials, demo model and caches into an environment.
set -eu
python=/opt/mpm/bin/python
/tools/bin/pip --python "$python" install --no-compile --no-deps --no-index /wheels/*.whl
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

/tools/bin/cyclonedx-py environment --output-reproducible --output-file /opt/mpm/sbom.cdx.json "$python"

# Needed to compile against a package, or to test it; never to run it.
rm -rf "$packages"/torch/include "$packages"/torch/test "$packages"/openvino/include "$packages"/openvino/cmake \
    "$packages"/numba/tests "$packages"/numba/cuda/tests
find "$packages"/torch/bin -type f ! -name 'torch_shm_manager' -delete
find "$packages"/numpy "$packages"/sympy "$packages"/networkx -type d -name tests -prune -exec rm -rf {} +

# Numba takes its machine code for stale where a layer's archive has rounded the time of a source.
find "$packages"/mpm_ops "$packages"/handlers -name '*.py' -exec touch --date="@$SOURCE_DATE_EPOCH" {} +
# The root file system may be read-only, so that nobody could write these later. They are never checked again.
# Torch's own tests hold the syntax of later Pythons.
"$python" -m compileall -q -j 0 -x torch/testing/_internal --invalidation-mode unchecked-hash "$packages"

/opt/mpm/bin/mpm build --target "$1" --checkpoint "$packages"/model_store/demo/checkpoint.pth \
    --name segmenter --schedule 2,5 --metrics-port 8090 --config docker/serving.yml --out /models
chmod -R a+rX /models

export NUMBA_CACHE_DIR=/cache/numba
mkdir -p /cache/numba /cache/triton /cache/inductor
"$python" docker/warm.py "$packages"/model_store/demo
