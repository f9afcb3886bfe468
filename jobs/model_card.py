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
    lines += ["Vectors of users and items in one space, learnt from people's actions in their order.", ""]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in _facts(about).items()), ""]
    lines += ["![the run](training.svg)", "", "## How well it ranks the next item", ""]
    if "ndcg@10" in best:
        lines += [
            "Users held out for validation; the whole catalogue is ranked, nothing taken out. These figures chose",
            "the epoch, so they flatter it. What to report (the test window, new and repeated items, the floors beside",
            "them) is in the table `evaluation`. There split valid has other figures: a target that the model does not",
            "know is a miss, here it is left out; items that are never a target are not ranked, here they are.",
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
        "- An item that the model does not know has a vector of its attributes alone (`is_cold`), or none where the",
        "  model knows none of these; in a history it is read as `unknown`.",
        "- A history of few actions says little; one of unknown items alone says nothing. The table above shows it.",
        "- Older actions than those it reads do not count.",
        "- Its vectors are those of another version only as far as alignment.json, beside this card, says.",
        "- It has learnt what people did, with whatever was shown, sold out or advertised to them at the time.",
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
        test_from = about.get("test_from") or sequences["test_from"] or f"{TEST_DAYS} days before the log's end"
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
        "items": f"{spec['items']:,} numbers; unknown to the model are those with fewer than "
        f"{config['vocabulary']['min_count']} events in training",
        "trained by": f"{processes} in {seconds}",
        "epochs": f"{len(epochs)} of at most {training['planned_epochs']}; kept: the best, {training['best_epoch']}",
        "loss": f"{epochs[0]['loss']:.4f} in the first epoch, {epochs[-1]['loss']:.4f} in the last",
    }


def _table(heading: str, rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["", f"| {heading} | users | recall@10 | ndcg@10 |", "|---|---|---|---|"]
    for name, row in rows.items():
        cell = name.replace("|", r"\|")  # a vertical's name may contain anything
        lines.append(f"| {cell} | {row['users']:,} | {row['recall@10']:.4f} | {row['ndcg@10']:.4f} |")
    return lines
