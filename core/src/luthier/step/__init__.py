"""One optimizer step: what a loss gives is checked, coupled losses are replayed, and losses prepare themselves."""
