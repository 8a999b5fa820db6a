"""Annotation files of tools and data sets, read into one layout: a file per tool, and `formats.FORMATS`, a row each."""
