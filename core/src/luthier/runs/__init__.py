"""Run folders as one reads them afterwards: what trained here, how far it came, and how two of them differ."""
