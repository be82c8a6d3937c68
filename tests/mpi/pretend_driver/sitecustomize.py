"""Every Python that starts with this folder on its path, and the repository, has a pretended GPU.

PRETEND_DRIVER=1: in memory that only the device may touch. The pretend driver must be where libraries are found.
"""

import os
import sys

from tests import pretend_cupy
from tests.mpi import pretend_driver

sys.modules["cupy"] = pretend_cupy.module()
pretend_cupy.device.late_kernels = True
if os.environ.get("PRETEND_DRIVER") == "1":
    pretend_cupy.device.driver = pretend_driver.Driver()
