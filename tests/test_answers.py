"""An answer of a service that names no job is told as the service's fault, at every hosted provider."""

import pytest
from luthier import ProviderError
from luthier.jobs.wire.wire_answers import read_wire_job
from luthier_fireworks import answers as fireworks
from luthier_skypilot import Skypilot
from luthier_skypilot.managed_job import read_record
from luthier_together import answers as together
from luthier_vertex import answers as vertex

READERS = {
    "openai": read_wire_job,
    "together": together.read_job,
    "fireworks": fireworks.read_job,
    "vertex": vertex.read_job,
    "skypilot": lambda answer: read_record(answer, Skypilot()),
}


@pytest.mark.parametrize("answer", [{}, {"id": None, "name": None, "status": "running", "job_id": ""}], ids=str)
@pytest.mark.parametrize("service", READERS)
def test_an_answer_without_the_jobs_name_is_the_services_fault(service, answer):
    with pytest.raises(ProviderError) as caught:
        READERS[service](answer)
    assert caught.value.code == "provider-protocol"
