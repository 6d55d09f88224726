"""Contrastive losses, pooling and search for embedding models: fused, exact, memory-bounded. Needs torch alone."""
