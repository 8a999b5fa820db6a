"""End-to-end training of temporal action localization with rewired, reversible video backbones (Re2TAL, CVPR 2023)."""
