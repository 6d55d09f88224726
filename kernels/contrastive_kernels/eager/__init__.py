"""The losses in plain torch, tile by tile."""
