"""Packers: a source's official files in, a data set of arraytp out; one module per kind of source."""
