"""Benchmarks: each figure against a C floor that is compiled and measured in the same run."""
