"""Packers, which turn a source's official files into a data set of arraytp; one module per kind of source."""
