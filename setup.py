"""Packages and where they lie: the kernels in a folder of their own, the trainer's folder `train` installed as `vlm2vec.train`."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages("kernels", include=["contrastive_kernels*"]),
        *find_packages(".", include=["vlm2vec*"]),
        "vlm2vec.train",
        *(f"vlm2vec.train.{name}" for name in find_packages("train")),
    ],
    package_dir={"contrastive_kernels": "kernels/contrastive_kernels", "vlm2vec": "vlm2vec", "vlm2vec.train": "train"},
)
