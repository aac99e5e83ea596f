"""The contract of providers: the protocol, and the values that a provider and the job manager exchange."""
