"""The tokens of many texts at a time, in flat arrays: one text after another."""
