"""Runs on other machines: `desk_service` is their provider, given a place; `worker_desk` answers there."""
