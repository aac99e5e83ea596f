"""Jobs in a Kubernetes cluster: each is one TrainJob, named by the job's id and made by one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
from luthier import (
    Call,
    Capabilities,
    EventPage,
    Finding,
    JobArtifact,
    JobSpec,
    JobState,
    JobStatus,
    ProviderError,
    ServiceClient,
    ToldRun,
    pack_parcel,
    parcel_variables,
    read_told,
)

from luthier_kubernetes import Kubernetes
from luthier_kubernetes.access import Access, find_access
from luthier_kubernetes.train_job import (
    CANCELED,
    LABEL,
    STEP,
    VERSION,
    describe_job,
    name_job,
    read_job,
    result_folder,
)

LARGEST: Final = 700_000  # largest parcel in characters: an object of the cluster has at most 1.5 MB
PAGE: Final = 100
GROUP: Final = f"/apis/{VERSION}"
OVER: Final = ("exceeded quota", "quota exceeded")  # in the message of status 403


def build_service(options: Kubernetes) -> KubernetesService:
    """Return the provider. It reads no key, and makes no request, before it needs one."""
    return KubernetesService(options)


class KubernetesService:
    """The TrainJobs of one namespace. The remote id of a job is the name of its TrainJob."""

    def __init__(self, options: Kubernetes) -> None:
        self.options = options
        self._access: Access | None = None
        self._client: ServiceClient | None = None
        self._packed: tuple[str, dict[str, Any]] | None = None

    @property
    def access(self) -> Access:
        """The cluster and its user, found at the first use."""
        if self._access is None:
            self._access = find_access(self.options, self._now)
        return self._access

    def _now(self) -> float:
        return self.client.clock.now()

    @property
    def client(self) -> ServiceClient:
        """The client, created at its first use."""
        if self._client is None:
            access = self.access
            self._client = ServiceClient(
                access.server, service="kubernetes", headers=access.headers, renew=access.renew, tls=access.tls()
            )
        return self._client

    def scope(self) -> str:
        return f"{self.access.server}#{self.access.namespace}"

    @property
    def _jobs(self) -> str:
        return f"{GROUP}/namespaces/{self.access.namespace}/trainjobs"

    @property
    def _pods(self) -> str:
        return f"/api/v1/namespaces/{self.access.namespace}/pods"

    async def check(self) -> Mapping[str, Any]:
        """Check that the trainer is installed and the runtime exists."""
        options = self.options
        offered = await self.client.read_json(GROUP)
        if "trainjobs" not in {item.get("name") for item in offered.get("resources") or []}:
            raise ProviderError("not_found", f"the cluster has no TrainJobs of {VERSION}", where="kubernetes")
        own = options.runtime_kind == "TrainingRuntime"
        place = f"{GROUP}/namespaces/{self.access.namespace}" if own else GROUP
        await self.client.read_json(f"{place}/{options.runtime_kind.lower()}s/{options.runtime}")
        return {"namespace": self.access.namespace, "runtime": options.runtime}

    async def capabilities(self, model: str) -> Capabilities:
        return Capabilities(takes="recipe", poll=(5.0, 60.0))

    async def validate(self, job: JobSpec) -> Sequence[Finding]:
        """Pack the parcel, so that problems are reported before anything is sent."""
        self._body(job)
        if self.options.claim is not None:
            return ()
        message = f"no claim is named: unless the runtime mounts a volume at {self.options.folder}, results are lost"
        return [Finding(level="warning", rule="volume", where="provider.claim", message=message)]

    def _body(self, job: JobSpec) -> dict[str, Any]:
        """Return the TrainJob to create. It is packed once in this process; packing is deterministic."""
        if self._packed is not None and self._packed[0] == job.id:
            return self._packed[1]
        folder = result_folder(self.options, name_job(job.id))
        parcel = pack_parcel(job, self.options.work_folder, run=f"{folder}/run")
        variables = parcel_variables(parcel.content, LARGEST)
        self._packed = job.id, describe_job(job, self.options, variables, parcel.packages)
        return self._packed[1]

    async def submit(self, job: JobSpec, uploads: Mapping[str, str]) -> JobStatus:
        """Create the TrainJob. Fields that the cluster's trainer does not know are an error, and never dropped."""
        call = Call(method="POST", path=self._jobs, params={"fieldValidation": "Strict"}, json=self._body(job),
                    repeatable=False)  # fmt: skip
        try:
            answer = await self.client.send_call(call)
        except ProviderError as error:
            if error.kind == "permission" and any(word in error.problem.lower() for word in OVER):
                raise ProviderError("quota", error.problem, where=error.where) from None
            if error.kind == "not_found":
                remedy = "Install Kubeflow's trainer, or name another namespace."
                raise ProviderError("not_found", error.problem, where=error.where, remedy=remedy) from None
            raise
        return self._status(answer.body)

    async def find(self, job: JobSpec, uploads: Mapping[str, str]) -> Sequence[JobStatus]:
        try:
            item = await self.client.read_json(f"{self._jobs}/{name_job(job.id)}")
        except ProviderError as error:
            if error.kind == "not_found":
                return []
            raise
        return [self._status(item)]

    async def status(self, remote_id: str) -> JobStatus:
        """Return the status from the conditions. The reason of a failure is read from the output, if it exists."""
        status = self._status(await self.client.read_json(f"{self._jobs}/{remote_id}"))
        if status.state != JobState.FAILED:
            return status
        try:
            output, _ = await self._read_logs(remote_id, None)
        except ProviderError as error:
            return attrs.evolve(status, reason=f"{status.reason}; its output cannot be read: {error.problem}")
        return status if output.reason is None else attrs.evolve(status, reason=output.reason)

    def _status(self, item: Any) -> JobStatus:
        if not isinstance(item, dict) or "metadata" not in item:
            raise ProviderError("protocol", "the answer is not a TrainJob", where="kubernetes")
        return read_job(item, self.options)

    async def cancel(self, remote_id: str) -> None:
        """Suspend the TrainJob and mark it as cancelled. Its pods end, and its status can still be read."""
        if (await self.status(remote_id)).state.is_final:
            return
        change = {"metadata": {"annotations": {CANCELED: "true"}}, "spec": {"suspend": True}}
        kind = {"content-type": "application/merge-patch+json"}
        await self.client.send_call(Call(method="PATCH", path=f"{self._jobs}/{remote_id}", json=change, headers=kind))

    async def list(self, limit: int) -> Sequence[JobStatus]:
        """Return the newest jobs. All are read, because the cluster sorts them by name."""
        wanted = {"labelSelector": LABEL, "limit": PAGE}
        statuses = [self._status(item) async for item in self._items(self._jobs, wanted)]
        return sorted(statuses, key=lambda status: status.created or 0.0, reverse=True)[:limit]

    async def _items(self, path: str, wanted: Mapping[str, Any]) -> Any:
        """Yield the items of a list, page by page."""
        given, seen = dict(wanted), set[str]()
        while True:
            page = await self.client.read_json(path, given)
            for item in page.get("items") or []:
                yield item
            token = (page.get("metadata") or {}).get("continue")
            if not token:
                return
            if token in seen:
                raise ProviderError("protocol", "the list repeats itself", where=f"kubernetes: GET {path}")
            seen.add(token)
            given["continue"] = token

    async def events(self, remote_id: str, cursor: str | None) -> EventPage:
        """Return events made from the output of the first machine's pod, from the last second read on."""
        output, newest = await self._read_logs(remote_id, cursor)
        return EventPage(events=output.events, cursor=newest or cursor)

    async def _read_logs(self, remote_id: str, since: str | None) -> tuple[ToldRun, str | None]:
        """Return what the output reports since a moment, and the moment of its last complete line."""
        wanted = {
            "labelSelector": f"jobset.sigs.k8s.io/jobset-name={remote_id},jobset.sigs.k8s.io/replicatedjob-name={STEP}"
        }
        pods = [pod async for pod in self._items(self._pods, wanted)]
        first = [pod for pod in pods if _completion_index(pod) == "0" and _has_begun(pod)]
        lines, newest = [], None
        for pod in sorted(first, key=lambda pod: str(pod["metadata"].get("creationTimestamp"))):
            async for moment, line in self._read_lines(str(pod["metadata"]["name"]), since):
                lines.append(line)
                newest = moment
        return read_told(lines), newest

    async def _read_lines(self, pod: str, since: str | None) -> Any:
        given = {"container": STEP, "timestamps": "true", **({"sinceTime": since} if since else {})}
        rest = b""
        async with self.client.open_stream(
            f"{self._pods}/{pod}/log", params=given, headers={"accept-encoding": "identity"}
        ) as opened:
            async for block in opened.blocks():
                *whole, rest = (rest + block).split(b"\n")
                for line in whole:
                    moment, _, text = line.decode("utf-8", "replace").partition(" ")
                    yield moment, text

    async def artifacts(self, remote_id: str) -> Sequence[JobArtifact]:
        """Return the path of the results on the volume, which the cluster's API cannot read."""
        status = await self.status(remote_id)
        if status.result_model is None:
            return ()
        return [JobArtifact(kind="hosted", name=status.result_model, downloadable=False)]

    async def download(self, artifact: JobArtifact, folder: Path, progress: Any) -> Sequence[Path]:
        raise ProviderError(
            "unsupported", f"the results stay on the cluster's volume, at {artifact.name}", where="kubernetes"
        )

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.close()


def _completion_index(pod: Mapping[str, Any]) -> str:
    labels = pod["metadata"].get("labels") or {}
    return str(labels.get("batch.kubernetes.io/job-completion-index", "0"))


def _has_begun(pod: Mapping[str, Any]) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Running", "Succeeded", "Failed")
