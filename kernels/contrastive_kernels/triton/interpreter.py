"""Whether the kernels run in Triton's interpreter: read once, as Triton itself reads it when a kernel is decorated."""

import os

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0", "false", "off")
