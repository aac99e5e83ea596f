"""The store: every job, its journal and its events in one SQLite file, safe with several processes."""
