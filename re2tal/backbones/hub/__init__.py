"""Families of the transformers library, run over long video."""
