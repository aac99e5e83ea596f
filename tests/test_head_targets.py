"""The head as the only target: refused by every adapter before training, except by those that train modules as they are."""

import luthier
import pytest
from luthier.testing import expect_error
from luthier.testing.worlds import tiny_model, tiny_tokenizer

REFUSED = {
    "lora": "target_modules",
    "dora": "target_modules",
    "adalora": "target_modules",
    "slao": "target_modules",
    "osft": "target_patterns",
    "peft.vera": "adapter peft.vera.target_modules",
}


@pytest.fixture(scope="module")
def arguments():
    return {"model": tiny_model(), "tokenizer": tiny_tokenizer(), "data": [{"prompt": "a", "completion": "b"}]}


@pytest.mark.parametrize("name", REFUSED)
def test_an_adapter_of_the_head_alone_is_refused_in_the_plan(arguments, name):
    option = REFUSED[name].rpartition(".")[2]
    with expect_error("model-target", REFUSED[name], "lm_head"):
        luthier.plan(**arguments, adapter={"name": name, option: ["lm_head"]})


def test_the_head_alone_may_train_as_a_whole(arguments):
    plan = luthier.plan(**arguments, adapter={"name": "modules", "target_modules": ["lm_head"]})
    trained = plan.parameters["head"]["trainable"]
    assert trained == plan.parameters["all"]["trainable"] == arguments["model"].lm_head.weight.numel()
