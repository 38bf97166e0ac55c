"""In PYTHONPATH, this folder makes Python believe, in each process from its start, that the processor is an aarch64: so
channels use the scheme that they have there, one mutex for both ends.
"""

import platform

platform.machine = lambda: "aarch64"
