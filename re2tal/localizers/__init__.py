"""One file per localizer; LOCALIZERS lists them."""
