"""Data sets: the shard format, reading with every row verified, and batches for training."""
