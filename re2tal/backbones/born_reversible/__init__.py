"""Networks that were born reversible: RevViT and Rev-MViT."""
