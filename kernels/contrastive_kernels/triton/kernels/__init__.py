"""The Triton kernels: a file each, launchers beside them."""
