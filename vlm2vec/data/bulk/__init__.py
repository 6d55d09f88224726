"""Embeddings by the million: inputs that are streamed, shards of vectors that are whole or absent, ranks that need not know each other."""
