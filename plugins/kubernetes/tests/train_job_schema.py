"""The fields of a TrainJob that we rest on, as the CRD of the trainer's 2.3.0 has them, and what refuses all others."""

import re

NAME = {"type": str, "most": 253}
QUANTITY = {"type": (str, int)}
RESOURCES = {"type": dict, "values": QUANTITY}
ENVIRONMENT = {
    "type": list,
    "most": 128,
    "items": {"fields": {"name": NAME, "value": {"type": str}}, "required": ["name"]},
}
CLAIM = {"fields": {"claimName": NAME, "readOnly": {"type": bool}}, "required": ["claimName"]}
MOUNT = {"fields": {"name": NAME, "mountPath": {"type": str, "pattern": "[^:]+"}}, "required": ["name", "mountPath"]}
POD = {
    "fields": {
        "terminationGracePeriodSeconds": {"type": int},
        "volumes": {
            "type": list,
            "items": {"fields": {"name": NAME, "persistentVolumeClaim": CLAIM}, "required": ["name"]},
        },
        "containers": {
            "type": list,
            "items": {"fields": {"name": NAME, "volumeMounts": {"type": list, "items": MOUNT}}, "required": ["name"]},
        },
    }
}


def nested(*names, inner):
    for name in reversed(names):
        inner = {"fields": {name: inner}}
    return inner


REPLICATED = {"fields": {"name": NAME, "template": nested("spec", "template", "spec", inner=POD)}, "required": ["name"]}
PATCH = {
    "fields": {
        "manager": {"type": str, "most": 253, "pattern": ".+"},
        "trainingRuntimeSpec": nested("template", "spec", "replicatedJobs", inner={"type": list, "items": REPLICATED}),
    },
    "required": ["manager"],
}
TRAINER = {
    "fields": {
        "image": {"type": str, "most": 500},
        "command": {"type": list, "most": 128, "items": {"type": str, "most": 65536}},
        "env": ENVIRONMENT,
        "numNodes": {"type": int},
        "numProcPerNode": {"type": int},
        "resourcesPerNode": {"fields": {"requests": RESOURCES, "limits": RESOURCES}},
    }
}
SPEC = {
    "fields": {
        "runtimeRef": {"fields": {"name": NAME, "apiGroup": NAME, "kind": NAME}, "required": ["name"]},
        "trainer": TRAINER,
        "runtimePatches": {"type": list, "most": 16, "items": PATCH},
        "suspend": {"type": bool},
        "activeDeadlineSeconds": {"type": int},
    },
    "required": ["runtimeRef"],
}
TRAIN_JOB = {
    "fields": {
        "apiVersion": {"type": str, "pattern": "trainer.kubeflow.org/v1alpha1"},
        "kind": {"type": str, "pattern": "TrainJob"},
        "metadata": {
            "fields": {
                "name": {"type": str, "most": 63, "pattern": "[a-z]([-a-z0-9]*[a-z0-9])?"},
                "labels": {"type": dict, "values": {"type": str, "most": 63, "pattern": "[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"}},
                "annotations": {"type": dict, "values": {"type": str}},
            },
            "required": ["name"],
        },
        "spec": SPEC,
    },
    "required": ["apiVersion", "kind", "metadata", "spec"],
}  # fmt: skip


def find_faults(value, schema, where="TrainJob"):
    """Give what is wrong with a value, each fault with its place."""
    kind = schema.get("type", dict)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        yield f"{where}: {value!r} is no {kind}"
        return
    if "most" in schema and len(value) > schema["most"]:
        yield f"{where}: longer than {schema['most']}"
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value, re.DOTALL):
        yield f"{where}: {value!r} is not {schema['pattern']}"
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{where}.{name} is missing"
    if "fields" in schema:
        for name, item in value.items():
            if name not in schema["fields"]:
                yield f'unknown field "{where}.{name}"'
            else:
                yield from find_faults(item, schema["fields"][name], f"{where}.{name}")
    for name, item in value.items() if "values" in schema else enumerate(value) if "items" in schema else ():
        yield from find_faults(item, schema.get("values") or schema["items"], f"{where}[{name}]")
