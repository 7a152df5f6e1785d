"""Recipes: data files with sources, and what each field may hold."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest

import option_tables
from effnet_fast.cli.subcommands import build_parser
from effnet_fast.training import train
from effnet_fast.training.runs.optimization import TABLE
from effnet_fast.training.runs.recipe import (
    FOLDER,
    OPTIMIZERS,
    RECIPES,
    Recipe,
    read_recipe,
)
from effnet_fast.training.runs.settings import Settings


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_read_and_cites_its_sources(name):
    recipe = read_recipe(name)
    text = (FOLDER / f"{name}.toml").read_text()
    comment = " ".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"Sources?: .*(arXiv|https:)", comment)
    assert recipe.epochs >= 1


def test_every_data_file_is_a_recipe():
    assert sorted(path.stem for path in FOLDER.glob("*.toml")) == sorted(RECIPES)


def test_paper_is_the_papers():
    recipe = read_recipe("paper")
    assert (recipe.decay_rate, recipe.decay_epochs) == (0.97, 2.4)
    assert (recipe.optimizer, recipe.epsilon, recipe.ema) == ("rmsprop_tf", 1e-3, 0.9999)
    assert recipe.bn_momentum == pytest.approx(1 - 0.99)
    assert recipe.scaled_rate(4096) == pytest.approx(0.256)  # the paper's number


@pytest.mark.parametrize("table", [Recipe, Settings])
def test_the_command_line_and_python_take_every_option(table):
    parser = build_parser()
    parameters = inspect.signature(train).parameters
    plain = vars(parser.parse_args(["train", "DATA", "--out", "RUN"]))
    for entry in fields(table):
        option = entry.metadata["option"]
        assert option.rule.holds(entry.default)
        assert f"{entry.name}: " in table.__doc__
        # Of a recipe the file's value holds unless another one is given.
        assert plain[entry.name] == (None if table is Recipe else entry.default)
        if table is Settings:
            assert parameters[entry.name].default == entry.default
    assert set(OPTIMIZERS) == set(TABLE)


def test_options_are_read_as_their_rules_say():
    words = "train DATA --out RUN --epochs 3 --rate 0.5 --scale 0.2 0.9 --freeze all --no-freeze-bn"
    words += " --optimizer sgd --grad-checkpointing --unreadable-limit 4"
    found = vars(build_parser().parse_args(words.split()))
    expected = {"epochs": 3, "rate": 0.5, "scale": [0.2, 0.9], "freeze": -1, "freeze_bn": False}
    expected |= {"optimizer": "sgd", "grad_checkpointing": True, "unreadable_limit": 4}
    assert {name: found[name] for name in expected} == expected


def test_changes_replace_fields_and_none_leaves_them():
    before = read_recipe("finetune")
    after = read_recipe("finetune", {"epochs": 7, "rate": None, "scale": [0.5, 0.6]})
    assert (after.epochs, after.rate, after.scale) == (7, before.rate, (0.5, 0.6))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("epochs", 0, "at least 1"),
        ("epochs", True, "an int"),
        ("batch", 1.5, "an int"),
        ("rate", 0.0, "above 0"),
        ("rate", float("nan"), "above 0"),
        ("optimizer", "lion", "rmsprop_tf"),
        ("schedule", "linear", "cosine"),
        ("momentum", 1.0, "below 1"),
        ("layer_decay", 0.0, "above 0"),
        ("scale", [0.5, 0.2], "two rising"),
        ("scale", [0.5, 1.2], "at most 1"),
        ("ratio", [0.5], "two rising"),
        ("freeze", -2, "at least -1"),
        ("sync_bn", 1, "true or false"),
        ("class_weights", "equal", "balanced"),
        ("randaugment", 30, "below 30"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"{field} must be .*{re.escape(allowed)}"):
        read_recipe("finetune", {field: value})


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('epochs = 3\noptimizer = "sgd"\n')
    assert read_recipe(path).optimizer == "sgd"
    path.write_text("epoch = 3\n")
    with pytest.raises(ValueError, match=r"mine.toml: a recipe has no 'epoch'; it has .*epochs"):
        read_recipe(path)
    path.write_text("epochs = \n")
    with pytest.raises(ValueError, match=r"mine.toml"):
        read_recipe(path)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="one of finetune, paper, quick"):
        read_recipe("imagenet")
    with pytest.raises(TypeError, match="no 'epoch'"):
        read_recipe("quick", {"epoch": 3})


def test_the_document_has_the_tables():
    assert option_tables.tables() in option_tables.DOCUMENT.read_text("utf-8")
