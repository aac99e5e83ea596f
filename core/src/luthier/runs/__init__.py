"""Run folders as they are read afterwards: which run trained here, how far it came, and how two runs differ."""
