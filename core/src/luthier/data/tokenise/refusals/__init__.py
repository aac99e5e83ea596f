"""Refusals of rows that a chat template does not carry: what is lost, and which change of the row would help."""
