"""Runs on other machines: `desk_service` is the provider here, and `worker_desk` answers it on the other machine."""
