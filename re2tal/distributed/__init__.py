"""The place of this process among those of a run, and their collectives."""

from re2tal.distributed.collectives import (
    any_rank,
    exchange_objects,
    gather_objects,
    is_main,
    made_by_main,
    main_process_first,
    mean_over_ranks,
    named_host,
    refuse_differences,
    together,
    value_of_each_rank,
)
from re2tal.distributed.world import World, first_host, free_port, resolve_world

__all__ = [
    "World",
    "any_rank",
    "exchange_objects",
    "first_host",
    "free_port",
    "gather_objects",
    "is_main",
    "made_by_main",
    "main_process_first",
    "mean_over_ranks",
    "named_host",
    "refuse_differences",
    "resolve_world",
    "together",
    "value_of_each_rank",
]
