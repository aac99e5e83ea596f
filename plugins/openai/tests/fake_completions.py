"""A server of completions on this machine: it says the words of a prompt backwards, and keeps what it was asked."""

from luthier.testing import Reply

KEY = "sk-fake-0123456789"


class FakeCompletions:
    """It knows tokens that are the bytes of a text, 3 for the first. `strict`: only OpenAI's own fields, and text."""

    def __init__(self, models=("mine",), *, strict=False, key=None):
        self.models, self.strict, self.key = list(models), strict, key
        self.bodies = []

    def answer(self, request):
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return Reply(status=401, body={"error": {"message": f"wrong key {request.headers.get('authorization')}"}})
        if (request.method, request.path) == ("GET", "/v1/models"):
            return Reply(body={"object": "list", "data": [{"id": name} for name in self.models]})
        if (request.method, request.path) != ("POST", "/v1/completions"):
            return Reply(status=404, body={"error": {"message": "no such path"}})
        body = request.json
        if self.strict and ("stop_token_ids" in body or not isinstance(body["prompt"], str)):
            return Reply(status=422, body={"detail": "Unexpected fields in the request: {'stop_token_ids'}"})
        self.bodies.append(body)
        return Reply(body={"object": "text_completion", "choices": [{"index": 0, "text": self.complete(body)}]})

    @staticmethod
    def complete(body):
        prompt = body["prompt"]
        text = prompt if isinstance(prompt, str) else bytes(token - 3 for token in prompt).decode()
        return " ".join(text.split()[::-1][: body["max_tokens"]])
