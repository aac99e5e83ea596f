"""A service on Anyscale, on this machine: the kit's fake of the format, without what OpenAI alone has."""

from luthier.testing import FakeWire
from luthier_anyscale import Anyscale


class FakeAnyscale(FakeWire):
    model = "meta-llama/Llama-3-8b-chat-hf"

    def options(self, url, key):
        return Anyscale(base_url=f"{url}/v1", api_key=key)
