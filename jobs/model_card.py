"""The model card: card.md beside model.json.

It repeats the content of model.json for human readers (Mitchell et al., Model Cards for Model Reporting, 2019).
"""

from __future__ import annotations

from typing import Any

from jobs.config import TEST_DAYS


def card(about: dict[str, Any]) -> str:
    """The card as Markdown; `about` is the content of model.json."""
    training = about["training"]
    best = training["epochs"][training["best_epoch"] - 1]
    lines = [f"# Model {about['model_version']}", ""]
    lines += ["Vectors of users and items in one space, learnt from sequences of people's actions.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(about).items()), ""]
    lines += ["![the run](training.svg)", "", "## How well it ranks the next item", ""]
    if "ndcg@10" in best:
        lines += [
            "Measured on users held out for validation, over all items that the model knows (those new to the",
            "user if `sequences.seen_days` is 0). The epoch was chosen by these figures, so they flatter it.",
            "The figures to report (the test window, new and repeated items, with the baselines beside them) are in",
            "the table `evaluation`. There split valid has other figures: a target that the model does not know counts",
            "as a miss, here it is left out; items that are never a target are not ranked, here they are.",
            *_table("", {"all": {"users": training["held_users"], **best}}),
            *_table("by actions of history", best["by_history"]),
            *_table("by vertical of the next item", best["by_vertical"]),
        ]
    else:
        lines += ["Not measured: the valid split holds no user with a known next item."]
    lines += [
        "",
        "## Known limits",
        "",
        "- An item that the model does not know has a vector made of its attributes only (`is_cold`), or none if the",
        "  model knows none of them; in a history it is read as `unknown`.",
        "- A history of few actions says little, and one of unknown items only says nothing: see the table above.",
        "- Actions older than those it reads do not count.",
        "- An item's category, vertical and price are the log's latest, also from after the actions it is judged by.",
        "- Its vectors are comparable with another version's only as far as alignment.json, beside this card, says.",
        "- It has learnt what people did, given what they were shown, and what was sold out or advertised at the time.",
        "",
    ]
    return "\n".join(lines)


def _facts(about: dict[str, Any]) -> dict[str, str]:
    """The rows of the card's first table."""
    spec, training, provenance = about["spec"], about["training"], about["provenance"]
    epochs, config = training["epochs"], provenance["config"]
    sequences = config["sequences"]

    if sequences["split_by"] == "leave_one_out":
        trained, validated = "all of a user's actions but the last two", "each user's last action but one"
    else:
        trained = f"actions before {about['as_of']}"
        # None if nobody acted before it; missing in models of older versions.
        test_from = about.get("test_from") or sequences["test_from"] or f"about {TEST_DAYS} days before the log's end"
        validated = f"actions from {about['as_of']} to {test_from}"
    processes, seconds = f"{training['processes']} processes ({training['device']})", f"{training['seconds']:,.0f} s"
    return {
        "version": about["model_version"],
        "code": provenance["code_version"],
        "data": ", ".join(f"{table} version {number}" for table, number in provenance["reads"].items()),
        "training": trained,
        "grown from": about["grown_from"] or "no other model",
        "validation": validated,
        "network": f"{spec['architecture']}, width {spec['width']}, {spec['layers']} layers, {spec['heads']} heads",
        "history": f"the newest {spec['max_length'] - 1} actions of a user",
        "items": f"{spec['items']:,} numbers; items with fewer than {config['vocabulary']['min_count']} events in "
        f"training are unknown to the model",
        "trained by": f"{processes} in {seconds}",
        "epochs": f"{len(epochs)} of at most {training['planned_epochs']}; kept: epoch {training['best_epoch']} (best)",
        "loss": f"{epochs[0]['loss']:.4f} in the first epoch, {epochs[-1]['loss']:.4f} in the last",
    }


def _table(heading: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", f"| {heading} | users | recall@10 | ndcg@10 |", "|---|---|---|---|"]
    for name, row in rows.items():
        cell = name.replace("|", r"\|")  # a vertical's name may contain anything
        lines.append(f"| {cell} | {row['users']:,} | {row['recall@10']:.4f} | {row['ndcg@10']:.4f} |")
    return lines
