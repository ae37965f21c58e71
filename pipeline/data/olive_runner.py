"""Started with the Python of the environment for OpenVINO: runs one Olive pass there. Not a module of this project.

It lies in a folder without modules, since Python looks for `olive` beside the file that it starts first.
"""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any

from olive.hardware.accelerator import AcceleratorSpec, Device
from olive.passes import olive_pass
from olive.systems.python_environment.pass_runner import main


def _accelerator(accelerator_type: str, **rest: Any) -> AcceleratorSpec:
    """Olive 0.13.0 rebuilds it with plain text for the device, and OpenVINO's passes then fail: they want a member."""
    return AcceleratorSpec(accelerator_type=Device(accelerator_type), **rest)


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG: do not outlive the build
    olive_pass.AcceleratorSpec = _accelerator
    main()
