"""The contract of shards: what their JSON holds, reading and writing their tars, comparing every byte."""
