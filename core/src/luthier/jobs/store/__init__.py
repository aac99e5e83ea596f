"""The store: every job, its journal and its events in one SQLite file that several processes may use at once."""
