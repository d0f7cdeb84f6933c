"""The same, quick: threads and buffers, products, passes, inverses, in slices that fit a cache."""
