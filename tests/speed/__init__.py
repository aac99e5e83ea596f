"""Benchmarks: us and a peer, the same work in turn, and the ratio. Not part of the suite's asserts."""
