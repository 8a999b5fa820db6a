"""One file per backbone family; BACKBONES lists them."""
