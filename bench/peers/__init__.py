"""Others' ways to the same loss and gradients, next to ours: on a CPU, on a GPU, and emulated."""
