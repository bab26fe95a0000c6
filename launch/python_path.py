"""Where the Python processes of a command find modules: not in the directory that it was started in.

There, a file random.py or a folder data/ of somebody's own would take the place of what is meant.
"""

import os
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent


def python_variables() -> dict[str, str]:
    """Environment variables of Python processes, which so import our modules from here, installed or not."""
    earlier = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # An empty entry, as of PYTHONPATH=/somewhere:$PYTHONPATH, is the working directory.
    places = [str(CHECKOUT), *(place for place in earlier if place not in ("", str(CHECKOUT)))]
    return {"PYTHONPATH": os.pathsep.join(places), "PYTHONSAFEPATH": "1"}
