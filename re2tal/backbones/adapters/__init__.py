"""What learns in the place of a frozen backbone: parts of residual branches, so that blocks stay reversible."""
