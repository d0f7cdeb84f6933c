"""What the papers say: blocks, networks, feedback modules, and the plain form of every primitive."""
