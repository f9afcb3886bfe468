"""The card and the plot say what model.json says."""

from __future__ import annotations

import copy
from typing import Any
from xml.etree import ElementTree

from jobs.model_card import card
from jobs.pictures import training

SCORES = {"recall@10": 0.25, "ndcg@10": 0.125}
EPOCHS = [
    {"epoch": 1, "loss": 4.5, **SCORES, "by_history": {"1-4": {"users": 7, **SCORES}}, "by_vertical": {}},
    {
        "epoch": 2,
        "loss": 3.25,
        "recall@10": 0.5,
        "ndcg@10": 0.375,
        "by_history": {"1-4": {"users": 7, "recall@10": 0.0625, "ndcg@10": 0.03125}},
        "by_vertical": {"food | drinks": {"users": 1234, "recall@10": 1.0, "ndcg@10": 0.75}},
    },
]
ABOUT: dict[str, Any] = {
    "model_version": "abc123",
    "as_of": "2024-06-01T00:00:00",
    "test_from": "2024-06-29T00:00:00",
    "grown_from": None,
    "spec": {"architecture": "gpt2", "width": 64, "layers": 2, "heads": 4, "max_length": 256, "items": 18000},
    "provenance": {
        "code_version": "0.1.0+feed",
        "reads": {"sequences": 3, "items": 8},
        "config": {
            "train": {},
            "sequences": {"split_by": "time", "valid_from": None, "test_from": None},
            "vocabulary": {"min_count": 10},
        },
    },
    "training": {
        "processes": 2,
        "device": "cpu",
        "epochs": EPOCHS,
        "planned_epochs": 5,
        "best_epoch": 2,
        "held_users": 1500,
        "seconds": 61.2,
        "curve": [[10, 5.0], [20, 4.0], [30, 3.5]],
    },
}


def test_the_card_says_where_the_model_comes_from_and_how_well_it_ranks() -> None:
    text = card(ABOUT)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert ["data", "sequences version 3, items version 8"] in rows
    assert ["training", "actions before 2024-06-01T00:00:00"] in rows
    assert ["grown from", "no other model"] in rows
    assert "| grown from | fed987 |" in card({**ABOUT, "grown_from": "fed987"})
    validation = "| validation | actions from 2024-06-01T00:00:00 to {} |".format
    assert validation("2024-06-29T00:00:00") in text
    assert validation("about 28 days before the log's end") in card(
        {**ABOUT, "test_from": None}
    )  # it was asked of nobody
    assert ["epochs", "2 of at most 5; kept: epoch 2 (best)"] in rows
    assert ["all", "1,500", "0.5000", "0.3750"] in rows
    assert ["1-4", "7", "0.0625", "0.0312"] in rows
    assert r"| food \| drinks | 1,234 | 1.0000 | 0.7500 |" in text
    assert "There split valid has other figures" in text
    assert "## Known limits" in text
    assert "has no vector" not in text  # embed_items gives cold items one


def test_the_card_of_a_model_that_leaves_each_users_last_actions_out() -> None:
    about = copy.deepcopy(ABOUT)
    about["provenance"]["config"]["sequences"] = {"split_by": "leave_one_out", "valid_from": None, "test_from": None}
    text = card(about)
    assert "| training | all of a user's actions but the last two |" in text
    assert "| validation | each user's last action but one |" in text
    assert "before the log's end" not in text


def test_a_model_that_nobody_was_held_out_for() -> None:
    training = {**ABOUT["training"], "epochs": [{"epoch": 1, "loss": 4.5}], "best_epoch": 1}
    assert "Not measured" in card({**ABOUT, "training": training})


def test_the_plot_is_an_svg_alike_each_time() -> None:
    drawn = training(ABOUT)
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    assert training(ABOUT) == drawn


def test_the_plot_names_its_lines_and_numbers_few_epochs() -> None:
    def words(epochs: int) -> list[str]:
        scored = [{"epoch": epoch, "loss": 4.0, "ndcg@10": 0.5, "recall@10": 0.75} for epoch in range(1, epochs + 1)]
        drawn = training({**ABOUT, "training": {**ABOUT["training"], "epochs": scored, "best_epoch": 1}})
        return [str(text.text) for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")]

    assert {"training loss", "ndcg@10", "recall@10"} <= set(words(2))
    for epochs, numbers in ((1, ["1"]), (2, ["1", "2"])):  # no half ones
        between = words(epochs).index("training loss") + 1, words(epochs).index("epoch")
        assert words(epochs)[slice(*between)] == numbers
    assert len(words(100)) < 40
