"""Answer a picture, so that what is compiled at its first call lies in NUMBA_CACHE_DIR.

python warm.py FOLDER   # with checkpoint.pth
"""

import sys
from pathlib import Path

from handlers.config import ServingConfig
from handlers.engine.loading import load_engine, warm_up_picture

engine = load_engine(Path(sys.argv[1]), ServingConfig(), name="warm")
engine.warm_up([warm_up_picture()])
engine.close()
