"""Transport: HTTP to a service. Only `service_client` and `request_auth` import httpx."""
