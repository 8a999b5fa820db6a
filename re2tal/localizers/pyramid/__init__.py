"""Localizers on a feature pyramid: encoder, heads, loss and decoding of ActionFormer's kind."""
