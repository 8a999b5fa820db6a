"""Networks that were born reversible: RevNet, RevViT and Rev-MViT."""
