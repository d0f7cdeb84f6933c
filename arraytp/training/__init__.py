"""A run: its plan, the experiment, the loop, checkpoints, tables, studies and traces."""
