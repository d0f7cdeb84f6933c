"""Limit the memory that the system grants for a while, like `ulimit -v`."""

import resource
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def limited_memory(more):
    """Grant at most `more` bytes of address space beyond what is in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
