"""The recipes that come along, and the skeleton of a new one."""


import pytest
import yaml

from kbne_edit import load_recipe
from kbne_edit.errors import InputError, OutputError
from kbne_edit.recipe import _KEYS, new_recipe


def test_the_skeleton_is_a_recipe_in_order(tmp_path):
    new_recipe("no", tmp_path / "r.yaml")  # a name that plain YAML takes for false
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.name == "no" and len(recipe.questions) == len(recipe.controls) == 9 and len(recipe.probes) == 2
    assert [(q.form, q.answer) for q in recipe.questions] == [(q.form, q.answer) for q in recipe.controls]
    text = (tmp_path / "r.yaml").read_text(encoding="utf-8")
    assert set(yaml.safe_load(text)) == _KEYS  # every key of the format is shown
    assert "NAME" not in text and max(map(len, text.splitlines())) <= 120


def test_the_skeleton_overwrites_nothing(tmp_path):
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        new_recipe("r", tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
    with pytest.raises(OutputError, match="cannot write"):
        new_recipe("r", tmp_path / "nowhere" / "r.yaml")


@pytest.mark.parametrize("name", ["", "../up", 'a"b', "a b", "-x", "a\nb"])
def test_names_that_would_not_stand_in_a_file(name, tmp_path):
    with pytest.raises(InputError, match="no name"):
        new_recipe(name, tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()
