"""The commands that a user of this installation has: messages name them.

In a checkout the folder is the package `train`, installed it is `vlm2vec.train`.
"""

PACKAGE = __name__.rpartition(".")[0]  # also what torchrun's -m takes
COMMAND = "python -m train" if PACKAGE == "train" else "vlm2vec train"
TORCHRUN = f"-m {PACKAGE}"
EXTRA = "-e '.[train]'" if PACKAGE == "train" else "'vlm2vec[train]'"
