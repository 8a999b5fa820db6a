"""Videos and shards on other machines: what an address is, how it is read, and what is kept of it here."""
