"""What this machine gives a process, asked the same way on Linux, macOS and Windows."""

from __future__ import annotations

import os
import sys
from importlib import metadata


def installed_version(package: str) -> str:
    """The version of a package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def num_cores() -> int:
    """How many cores this process may use; where the system does not tell, how many the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_workers(given: int | None) -> int:
    """What --workers says, or one per core that this process may use. ValueError below 1."""
    if given is not None and given < 1:
        raise ValueError(f"--workers is {given}; give 1 or more")
    return num_cores() if given is None else given


def peak_resident_bytes() -> int:
    """The most memory that this process held so far; 0 where the system does not tell, as on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def memory_bytes() -> int | None:
    """The machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def open_files() -> tuple[int, int] | None:
    """How many files this process may have open, and how high it may raise that; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)
