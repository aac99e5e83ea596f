"""Streaming: rows that are read while the run goes on, and the feed over them."""
