"""Benchmarks: each file asks one question and prints the answer; see README.md."""
