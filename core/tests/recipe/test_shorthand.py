"""Short forms of a recipe that only mean one thing."""

from luthier.recipe import Recipe


def test_one_source_may_stand_for_the_data_beside_what_is_said_of_all_rows(plugins):
    short = {"model": "m", "data": {"path": "d.csv", "columns": {"prompt": "Frage"}, "max_length": 64}}
    data = Recipe.from_dict(short, plugins=plugins).data
    assert (data.train[0].path, data.train[0].columns, data.max_length) == ("d.csv", {"prompt": "Frage"}, 64)
