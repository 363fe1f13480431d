"""Benchmarks: what they measure and how they say it. The commands are in `tandem.cli.bench`."""
