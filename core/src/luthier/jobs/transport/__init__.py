"""Transport: HTTP to a service. `service_client` and `request_auth` import httpx; the rest of it stands apart."""
