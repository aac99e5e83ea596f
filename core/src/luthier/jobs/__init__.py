"""Jobs: one recipe trained here or at a service, with a journal by which no job is lost or made twice. Without torch.

The command line, the API and the providers use this room. From the lowest to the highest: `secret` and `job_state`;
`job_records`, the values that providers and the manager exchange; `transport`, the only one that speaks HTTP; `rows`,
which turns the recipe's data into a service's files; `store`, the journal; `submission`, `following` and `manager`.
"""
