"""The kit's checks of engines against a fake server."""

import pytest
from fake_completions import FakeCompletions
from luthier.testing import LoopbackServer, conformance
from luthier_openai import OpenAIServer, luthier_engines

SERVER = LoopbackServer(FakeCompletions().answer)
EXAMPLES = [
    OpenAIServer(base_url=f"{SERVER.url}/v1"),
    OpenAIServer(
        base_url=f"{SERVER.url}/v1/", model="mine", prompt="text", stop_token_ids=False, top_p=0.9, concurrency=1
    ),
]


@pytest.fixture(scope="module", autouse=True)
def served():
    with SERVER.running():
        yield


@conformance(luthier_engines(), examples=EXAMPLES, vary=False)
def test_conforms(check):
    check()
