"""python -m tokvm.testing.vsphere FOLDER HOST   serves until it is killed."""

import sys
import threading
from pathlib import Path

from tokvm.testing.vsphere.serving import Serving

serving = Serving(Path(sys.argv[1]), Path(sys.argv[2]))
(Path(sys.argv[1]) / "ready").touch()
threading.Event().wait()
