"""Providers that are broken in one way each, made of the one that new-plugin --kind provider writes."""

import sys
import types
import uuid

import attrs
from luthier import Call, JobState, ProviderError, ProviderRecord, SettingRule
from luthier.scaffold import render


def written(name):
    """The modules of a generated provider: its options, the provider, and its tests with the fake."""
    files = render(name, "provider")
    for module, path in (
        (f"luthier_{name}", f"src/luthier_{name}/__init__.py"),
        (f"luthier_{name}.provider", f"src/luthier_{name}/provider.py"),
        (f"test_{name}", f"tests/test_{name}.py"),
    ):
        made = types.ModuleType(module)
        made.__path__ = []
        sys.modules[module] = made
        exec(compile(files[path], path, "exec"), vars(made))
    return (sys.modules[m] for m in (f"luthier_{name}", f"luthier_{name}.provider", f"test_{name}"))


acme, provider, tests = written("acme")
Sound, Fake = provider.AcmeProvider, tests.AcmeFake
(SOUND,) = acme.luthier_providers()


class LosesAnswers(Sound):
    def encode(self, row):
        return {"messages": super().encode(row)["messages"][:1]}


class AsksFirst(Sound):
    async def capabilities(self, model):
        await self.client.read_json("/jobs", {"limit": 1})
        return await super().capabilities(model)


class TakesAnything(Sound):
    async def capabilities(self, model):
        found = await super().capabilities(model)
        return attrs.evolve(found, settings={**found.settings, "layerwise_lr_decay": SettingRule()})


class ChangesTheAddress(Sound):
    def __init__(self, options):
        super().__init__(
            attrs.evolve(options, base_url=options.base_url.replace("http://service.", "https://service."))
        )


class NeverFinds(Sound):
    async def find(self, job, uploads):
        return []


class CannotFind(Sound):
    async def find(self, job, uploads):
        return None


class SendsTwice(Sound):
    async def submit(self, job, uploads):
        body = {"model": job.model, "file": uploads["training"], "tag": job.id}
        return provider._status(await self.client.post_json("/jobs", body, repeatable=True))


class TagsByProcess(Sound):
    async def submit(self, job, uploads):
        return await super().submit(attrs.evolve(job, id=f"{job.id}-{id(self)}"), uploads)

    async def find(self, job, uploads):
        return await super().find(attrs.evolve(job, id=f"{job.id}-{id(self)}"), uploads)


class ForgetsUploads(Sound):
    """It keeps in memory what a new process cannot know."""

    async def upload(self, job, file, known, progress):
        self.mine = await super().upload(job, file, known, progress)
        return self.mine

    async def submit(self, job, uploads):
        if getattr(self, "mine", None) is None:
            raise ProviderError("invalid", "the file was not uploaded by this process")
        return await super().submit(job, uploads)


class TakesOthers(Sound):
    async def find(self, job, uploads):
        found = (await self.client.read_json("/jobs", {"limit": 1})).get("jobs") or []
        return [provider._status(item) for item in found]


class TriesTheKeyAgain(Sound):
    async def upload(self, job, file, known, progress):
        for _ in range(2):
            try:
                return await super().upload(job, file, known, progress)
            except ProviderError:
                continue
        return await super().upload(job, file, known, progress)


class TakesHasteForRefusal(Sound):
    async def submit(self, job, uploads):
        call = Call(method="POST", path="/jobs", json={"model": job.model, "file": uploads["training"], "tag": job.id},
                    repeatable=False, accepted=(200, 429))  # fmt: skip
        answer = await self.client.send_call(call)
        if answer.status == 429:
            raise ProviderError("invalid", "refused")
        return provider._status(answer.body)


class UploadsAgain(Sound):
    async def upload(self, job, file, known, progress):
        return await super().upload(job, file, None, progress)


class ShowsTheKey(Sound):
    def _headers(self):
        self.seen = super()._headers()["authorization"].reveal()
        return super()._headers()


class MistakesAState(Sound):
    async def status(self, remote_id):
        found = await super().status(remote_id)
        return attrs.evolve(found, state=JobState.RUNNING) if found.raw_state == "broken" else found


class TakesUnknownForPending(Sound):
    async def status(self, remote_id):
        found = await super().status(remote_id)
        return attrs.evolve(found, state=JobState.PENDING) if found.state == JobState.UNKNOWN else found


class StatusPosts(Sound):
    async def status(self, remote_id):
        return provider._status(await self.client.post_json(f"/jobs/{remote_id}", repeatable=True))


class GivesUpAtOnce(Sound):
    async def status(self, remote_id):
        answer = await self.client.send_call(Call(method="GET", path=f"/jobs/{remote_id}", repeatable=False))
        return provider._status(answer.body)


class TakesRubbishForRunning(Sound):
    async def status(self, remote_id):
        try:
            return await super().status(remote_id)
        except ProviderError:
            return provider._status({"id": remote_id, "state": "training"})


class DoesNotCancel(Sound):
    async def cancel(self, remote_id):
        return None


class ListsOne(Sound):
    async def list(self, limit):
        return await super().list(1)


class NamesEventsAnew(Sound):
    async def events(self, remote_id, cursor):
        page = await super().events(remote_id, None)
        return attrs.evolve(page, events=[attrs.evolve(e, id=uuid.uuid4().hex) for e in page.events])


class DownloadsNothing(Sound):
    async def download(self, artifact, folder, progress):
        return []


class KeepsHalfAFile(Sound):
    async def download(self, artifact, folder, progress):
        target = folder / "adapter_model.safetensors"
        with target.open("wb") as file:
            try:
                async with self.client.open_stream(f"/jobs/{artifact.locator['job']}/weights") as opened:
                    async for block in opened.blocks():
                        file.write(block)
            except ProviderError:
                pass
        return [target]


@attrs.frozen
class Mutant:
    cls: type
    caught_by: str
    says: str

    @property
    def record(self):
        return ProviderRecord(name=SOUND.name, summary=SOUND.summary, options=SOUND.options,
                              build=f"{__name__}:{self.cls.__name__}")  # fmt: skip


MUTANTS = [
    Mutant(LosesAnswers, "a_job_arrives_with_its_rows", "a row arrived as"),
    Mutant(AsksFirst, "a_broken_row_sends_nothing", "requests were sent nevertheless: GET /jobs"),
    Mutant(TakesAnything, "a_setting_that_is_not_offered_sends_nothing", "it was accepted"),
    Mutant(ChangesTheAddress, "a_plain_address_gets_no_key", "refused for another reason"),
    Mutant(NeverFinds, "a_lost_answer_makes_one_job", "[23] jobs were made|the service has no job that they made"),
    Mutant(CannotFind, "a_request_that_never_arrived_is_sent_again", "cannot tell"),
    Mutant(SendsTwice, "a_job_that_is_listed_late_is_waited_for", "2 jobs were made|several jobs may be"),
    Mutant(ForgetsUploads, "a_death_at_any_step_makes_one_job", "uploaded by this process"),
    Mutant(TagsByProcess, "a_death_before_the_answer_is_kept_makes_one_job", "2 jobs were made"),
    Mutant(TakesOthers, "other_peoples_jobs_are_not_taken", "belongs to another job"),
    Mutant(TriesTheKeyAgain, "a_wrong_key_is_asked_once", "3 requests were sent"),
    Mutant(TakesHasteForRefusal, "a_busy_service_is_waited_for", "refused"),
    Mutant(UploadsAgain, "the_same_bytes_are_sent_once", "sent again"),
    Mutant(ShowsTheKey, "a_key_shows_nowhere", "the key stands in a text of the part"),
    Mutant(MistakesAState, "every_documented_state_is_known", "'broken' is reported as running"),
    Mutant(TakesUnknownForPending, "an_unknown_state_is_unknown", "it is pending"),
    Mutant(StatusPosts, "a_status_only_reads", "it sent POST"),
    Mutant(GivesUpAtOnce, "a_cut_connection_is_borne", "RemoteProtocolError|ReadError"),
    Mutant(TakesRubbishForRunning, "an_unreadable_answer_is_told", "was mistaken for the state running"),
    Mutant(DoesNotCancel, "a_cancelled_job_ends_once", "was not asked"),
    Mutant(ListsOne, "jobs_are_listed", "made .* listed"),
    Mutant(NamesEventsAnew, "events_come_once_each", "reads other events"),
    Mutant(DownloadsNothing, "results_are_given_or_refused_by_name", ""),
    Mutant(KeepsHalfAFile, "a_download_that_was_cut_is_whole", ""),
]
