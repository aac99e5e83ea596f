"""Jobs: one recipe trained here or at a service, journalled so that no job is lost or made twice. Imports no torch.

The command line, the API and the providers ask this room. From the ground up: `secret` and `job_state`; `job_records`,
the values that providers and the manager exchange; `transport`, which alone speaks HTTP; `rows`, which turns the
recipe's data into a service's files; `store`, the journal; `submission`, `following` and `manager`, which act.
"""
