"""Transport: HTTP to a service. `service_client` alone imports httpx; the rest of it stands apart."""
