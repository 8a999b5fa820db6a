"""The parts of `benchmarks/claims.py`: what each measures, and how docs/evidence.md shows it."""
