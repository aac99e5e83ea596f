"""Fields of options, described for people."""
