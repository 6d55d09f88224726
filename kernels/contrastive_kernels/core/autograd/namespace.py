"""The namespace of this package's operators in `torch.ops`: its own name, so that a copy under another name registers others.

Kernel loaders import the package's folder under a name of their own, more than once a process; an operator of a name that exists
replaces the earlier one, whose package would then call nothing.
"""

import re

NAMESPACE = re.sub(r"\W", "_", __name__.removesuffix(".core.autograd.namespace"))
