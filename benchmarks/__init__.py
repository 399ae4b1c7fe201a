"""Benchmarks: what a compiled reduction gains over dense models, and how near it comes to a hand-written one."""
