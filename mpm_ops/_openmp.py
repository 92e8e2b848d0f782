"""Imported before torch: OpenMP reads its settings once, when it is loaded.

Threads that wait for torch's next operator would spin, and take the cores from OpenVINO, decoders and encoders.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
