"""Facts of SkyPilot 0.14.1: the fields of its requests' bodies (`server/requests/payloads.py`) and of its tasks.

SkyPilot itself ignores a field of a body that it does not know; here it is a fault. Of tasks only what a job of ours
may use is listed, of `utils/schemas.py`.
"""

TEXT, FLAG, WHOLE, MAPPING = (str,), (bool,), (int,), (dict,)
NONE = (type(None),)
EVERY = {"env_vars": MAPPING, "entrypoint": TEXT, "entrypoint_command": TEXT, "using_remote_api_server": FLAG}
BODIES = {
    "/optimize": {**EVERY, "dag!": TEXT, "minimize": WHOLE, "request_options!": (dict, *NONE)},
    "/jobs/launch": {**EVERY, "task!": TEXT, "name!": (str, *NONE), "pool": (str, *NONE), "num_jobs": (int, *NONE)},
    "/jobs/queue/v2": {
        **EVERY, "refresh": FLAG, "skip_finished": FLAG, "all_users": FLAG, "job_ids": (list, *NONE),
        "name_match": (str, *NONE), "page": (int, *NONE), "limit": (int, *NONE), "statuses": (list, *NONE),
        "fields": (list, *NONE), "sort_by": (str, *NONE), "sort_order": (str, *NONE),
    },
    "/jobs/cancel": {**EVERY, "name": (str, *NONE), "job_ids": (list, *NONE), "all": FLAG, "all_users": FLAG,
                     "graceful": FLAG, "graceful_timeout": (int, *NONE)},
    "/jobs/logs": {**EVERY, "name": (str, *NONE), "job_id": (int, *NONE), "follow": FLAG, "controller": FLAG,
                   "refresh": FLAG, "tail": (int, *NONE)},
}  # fmt: skip
RESOURCES = {
    "infra": TEXT, "accelerators": (str, dict), "cpus": (str, int, float), "memory": (str, int, float),
    "use_spot": FLAG, "image_id": (str, dict), "disk_size": (str, int),
}  # fmt: skip
TASK = {
    "name": TEXT, "resources": RESOURCES, "num_nodes": WHOLE, "envs": MAPPING, "file_mounts": MAPPING, "setup": TEXT,
    "run": TEXT,
}  # fmt: skip


def find_faults(value, known):
    """Yield what is wrong with an object, by the names and types of its fields; `!` marks those that it must have."""
    fields = {name.rstrip("!"): kinds for name, kinds in known.items()}
    yield from (f"{name} is missing" for name in known if name.endswith("!") and name[:-1] not in value)
    for name, given in value.items():
        kinds = fields.get(name)
        if kinds is None:
            yield f"{name} is not known"
        elif isinstance(kinds, dict):
            yield from find_faults(given, kinds)
        elif not isinstance(given, kinds) or (isinstance(given, bool) and bool not in kinds):
            yield f"{name} is {given!r}"
