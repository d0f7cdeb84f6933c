"""The fast engine: threads, buffers, products, passes and inverses in cache-sized slices."""
