"""The conformance kit's checks of benchmarks."""
