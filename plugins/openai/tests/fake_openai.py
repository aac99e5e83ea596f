"""OpenAI's fine-tuning on this machine: the kit's fake of the format, at OpenAI's options."""

from luthier.testing import FakeWire
from luthier_openai import OpenAI


class FakeOpenAI(FakeWire):
    def options(self, url, key):
        return OpenAI(base_url=f"{url}/v1", api_key=key)
