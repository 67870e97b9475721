"""Fewer embeddings a picture: merging of tokens that look alike, and pooling."""
