"""The files that a running run writes to its folder and reads back: record, lock, decisions, requests."""
