"""Data: rows are read, recognised, rendered by a template, tokenised, packed and ordered. Reading needs no torch."""
