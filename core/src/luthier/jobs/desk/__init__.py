"""Runs on other machines: `desk_service` is their provider, given a place; the builtins' `worker_desk` answers there."""
