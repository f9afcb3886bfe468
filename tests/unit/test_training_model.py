import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers4rec.torch as tr
from merlin.schema import ColumnSchema, Schema, Tags
from torch import Tensor
from transformers4rec.torch.tabular.aggregation import ElementwiseSum

from jobs.errors import TrailvecError
from tests.sequence_files import CONTEXT_SIZES, ITEMS, MAX_LENGTH, SPEC, item_counts, make_rows, save_model
from training.batches import FEATURES, TARGET, pad
from training.checkpoint import ItemVectors, load_model, read_about, read_alignment, save_weights
from training.model import SequenceModel, build_model
from training.softmax import gbce

torch.set_num_threads(1)  # tests run side by side: threads that wait for each other are slower than one

ROWS = [row for row in make_rows(40) if row["length"] < SPEC.max_length]


def make_model(**changes: object) -> SequenceModel:
    torch.manual_seed(3)
    model = build_model(SPEC.model_copy(update=changes), torch.from_numpy(item_counts(make_rows(200))))
    with torch.no_grad():  # weights of some size: the first ones are so small that all states are alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def make_batch(rows: list[dict], width: int) -> dict[str, Tensor]:
    lengths = np.array([row["length"] for row in rows])
    batch = {n: torch.from_numpy(pad(np.concatenate([r[n] for r in rows]), lengths, width)).long() for n in FEATURES}
    return with_targets(batch)


def with_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each action is to predict the next one of its row."""
    return {**batch, TARGET: torch.nn.functional.pad(batch["item_index"][:, 1:], (0, 1))}


class SumWithLongerItems(ElementwiseSum):
    """An item's vector is sqrt(width) times longer as an input than in the head."""

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().forward({**inputs, "item_index": inputs["item_index"] * SPEC.width**0.5})


OBJECTIVES = [
    ("gpt2", "clm"),
    *[("xlnet", objective) for objective in ("clm", "mlm", "rtd", "plm")],
    *[(name, objective) for name in ("bert", "electra") for objective in ("clm", "mlm", "rtd")],
]


def test_the_states_are_those_of_transformers4recs_own_model() -> None:
    """Its inputs, its causal masking and its head around the same weights give the same scores of all items."""
    model, batch = make_model(), make_batch(ROWS, SPEC.history_length)
    columns = [
        ColumnSchema(
            name,
            dtype="int64",
            is_list=True,
            tags=[Tags.CATEGORICAL, *([Tags.ITEM_ID] if name == "item_index" else [])],
            properties={"domain": {"min": 0, "max": size - 1}, "value_count": {"min": MAX_LENGTH, "max": MAX_LENGTH}},
        )
        for name, size in {"item_index": ITEMS, **CONTEXT_SIZES}.items()
    ]
    inputs = tr.TabularSequenceFeatures.from_schema(
        Schema(columns),
        max_sequence_length=MAX_LENGTH,
        embedding_dim_default=SPEC.width,
        embedding_dims={"item_index": SPEC.width},
        aggregation=SumWithLongerItems(),
        masking="clm",
    )
    block = tr.TransformerBlock(model.transformer, masking=inputs.masking)
    task = tr.NextItemPredictionTask(weight_tying=True, metrics=[])
    theirs = tr.Model(tr.Head(tr.SequentialBlock(inputs, block), task, inputs=inputs)).eval()
    tables = theirs.heads[0].body.inputs.categorical_module.embedding_tables
    with torch.inference_mode():
        tables["item_index"].weight.copy_(model.table.own.weight)
        for name in CONTEXT_SIZES:
            tables[name].weight.copy_(model.inputs.categorical_module.embedding_tables[name].weight)
        expected = theirs({name: batch[name] for name in FEATURES}, training=False, testing=False)
        ours = model.encode(batch) @ model.item_vectors().T
    assert expected.std() > 0.1
    # Items that training never saw have no vector of their own here.
    torch.testing.assert_close(ours[:, 2:29], expected[:, 2:29], rtol=1e-5, atol=1e-5)


def test_loss_is_the_cross_entropy_of_every_known_next_item() -> None:
    model, batch = make_model(), make_batch(ROWS, SPEC.max_length)
    longest = max(range(len(ROWS)), key=lambda row: ROWS[row]["length"])
    batch["item_index"][0, 0] = 1  # unknown as an input
    batch["item_index"][1, 1] = 1  # unknown as a target (and then as an input)
    batch["item_index"][longest, 2] = 29  # the same, by a number that the model must not know
    newer = {name: matrix.clone() for name, matrix in batch.items()}
    newer["item_index"][longest, 2] = ITEMS + 5  # the same, by a number that came after the model
    batch, newer = with_targets(batch), with_targets(newer)
    with torch.inference_mode():
        total, positions = model.loss(batch)
        assert model.loss(newer) == (total, positions)
        expected, count = 0.0, 0
        for row in range(len(ROWS)):
            for end in range(1, ROWS[row]["length"]):
                target = int(batch["item_index"][row, end])
                if target not in (1, 29):
                    prefix = {name: matrix[row : row + 1, :end] for name, matrix in batch.items()}
                    scores = model.encode(prefix)[0] @ model.item_vectors().T
                    expected += float(torch.logsumexp(scores[2:29], 0) - scores[target])  # the items that it knows
                    count += 1
    assert positions == count
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_gbce_goes_by_how_many_items_the_model_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    model, told = make_model(negatives=12, loss="gbce", negative_power=0.0), []
    monkeypatch.setattr("training.model.gbce", lambda *given, **more: told.append(more) or gbce(*given, **more))
    loss, count = model.loss(make_batch(ROWS, SPEC.max_length))
    loss.backward()
    assert told == [{"known_items": 27, "t": 0.75}]
    assert count == sum(row["length"] - 1 for row in ROWS)
    assert model.table.own.weight.grad.any()


def test_a_batch_without_targets_has_no_loss() -> None:
    for negatives in (0, 5):
        loss, positions = make_model(negatives=negatives).loss(make_batch([r for r in ROWS if r["length"] == 1], 7))
        assert (float(loss), positions) == (0, 0)


@pytest.mark.parametrize(("architecture", "objective"), OBJECTIVES)
def test_a_row_has_the_same_vector_whatever_its_neighbours(architecture: str, objective: str) -> None:
    model = make_model(architecture=architecture, objective=objective)
    with torch.inference_mode():
        together = model.encode(make_batch(ROWS, SPEC.history_length))
        alone = torch.cat([model.encode(make_batch([row], row["length"])) for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.pdist(alone).max() > 0.1


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("gpt2", ("n_embd", "n_layer", "n_head", "n_inner")),
        ("xlnet", ("d_model", "n_layer", "n_head", "d_inner")),
        *(
            (name, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
            for name in ("bert", "electra")
        ),
    ],
)
def test_a_block_has_the_configured_sizes_and_dropout(architecture: str, names: tuple[str, ...]) -> None:
    transformer = make_model(architecture=architecture, width=24, layers=3, heads=4, dropout=0.375).transformer
    assert [getattr(transformer.config, name) for name in names] == [24, 3, 4, 96]
    assert {part.p for part in transformer.modules() if isinstance(part, torch.nn.Dropout)} == {0.375}


@pytest.mark.parametrize(("architecture", "objective"), OBJECTIVES)
def test_at_the_start_a_long_history_is_not_lost(architecture: str, objective: str) -> None:
    """40 items, five times each, and then another one. Where attention begins at random, they score no higher than the
    rest, and where it begins as a plain mean, that last one scores 6 to 8 (GPT-2), for others 13 and more times as high
    as they do."""
    items, history = 1000, torch.arange(2, 42).repeat(5)
    changes = {"architecture": architecture, "objective": objective, "items": items, "max_length": len(history) + 2}
    changes |= {"width": 64, "context_sizes": {}, "attribute_sizes": {}}
    leads, ratios = [], []
    for seed in range(4):
        torch.manual_seed(seed)
        model = build_model(SPEC.model_copy(update=changes), torch.full((items,), 5)).eval()
        row = torch.cat([history[torch.randperm(len(history))], torch.tensor([500])])
        with torch.inference_mode():
            scores = model.encode({"item_index": row[None]})[0] @ model.item_vectors().T
        old, others = scores[2:42], scores[42:500]
        leads.append(float((old.mean() - others.mean()) / others.std()))
        ratios.append(float(scores[500] / old.mean()))
    assert np.mean(leads) > 0.5
    if objective == "clm":  # the others read the state of an action that is masked, not of the last one
        assert 0 < min(ratios) < max(ratios) < (5 if architecture == "gpt2" else 10)


@pytest.mark.parametrize("architecture", ["gpt2", "xlnet", "bert", "electra"])
def test_what_comes_later_is_never_seen_in_causal_training(architecture: str) -> None:
    model = make_model(architecture=architecture)
    batch = make_batch([row for row in ROWS if row["length"] > 5][:4], SPEC.history_length)
    changed = {name: matrix.clone() for name, matrix in batch.items()}
    changed["item_index"][:, 4:] = changed["hour"][:, 4:] = 3
    with torch.inference_mode():
        present = batch["item_index"] > 0
        states, others = (model._states(model._embed(b), present) for b in (batch, changed))
    torch.testing.assert_close(states[:, :4], others[:, :4], rtol=1e-5, atol=1e-5)
    assert (states[:, 4] - others[:, 4]).abs().max() > 0.01


@pytest.mark.parametrize(("architecture", "objective"), [pair for pair in OBJECTIVES if pair[1] != "clm"])
def test_what_is_hidden_is_not_seen_by_the_state_that_asks_for_it(
    architecture: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(architecture=architecture, objective=objective)
    batch, seen = make_batch(ROWS, SPEC.max_length), []
    states = model._states
    monkeypatch.setattr(model, "_states", lambda *given, **more: seen.append(states(*given, **more)) or seen[-1])
    with torch.inference_mode():
        info = model.masking.compute_masked_targets(batch["item_index"], training=True)
        hidden = info.targets > 0
        # Where nothing else is left to see, plm asks for nothing: the test below.
        rows = (hidden.any(dim=1) & (batch["item_index"][:, 1] > 0)).nonzero().squeeze(1)
        place = hidden[rows].float().argmax(dim=1)  # one hidden action of each of these rows
        changed = {name: matrix.clone() for name, matrix in batch.items()}
        changed["item_index"][rows, place] = changed["hour"][rows, place] = 3
        monkeypatch.setattr(model.masking, "compute_masked_targets", lambda *given, **more: info)
        for of in (batch, changed):
            torch.manual_seed(0)
            model.loss(of)
    one, other = (seen[number][rows, place] for number in (0, len(seen) // 2))  # rtd reads the actions twice
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_plm_asks_nothing_of_an_action_that_sees_no_other_one() -> None:
    model = make_model(architecture="xlnet", objective="plm")
    batch = make_batch([row for row in ROWS if row["length"] == 1], 7)
    assert sum(model.loss(batch)[1] for _ in range(20)) == 0


@pytest.mark.parametrize(("architecture", "objective"), [pair for pair in OBJECTIVES if pair[1] != "clm"])
def test_of_masked_actions_those_of_the_event_types_to_predict_are_asked_for(
    architecture: str, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked, types = make_model(architecture=architecture, objective=objective), [], torch.tensor([2])
    item_loss, batch = model._item_loss, make_batch(ROWS, SPEC.max_length)
    monkeypatch.setattr(model, "_item_loss", lambda *given: asked.append(given[1]) or item_loss(*given))
    with torch.inference_mode():
        model.loss(batch)
        model.loss(batch, types)
    of_all, of_types = (set(batch["event_type_index"][targets > 0].tolist()) for targets in asked)
    assert of_types == {2} < of_all


@pytest.mark.parametrize(
    ("architecture", "objective", "negatives"), [*((*pair, 0) for pair in OBJECTIVES), ("gpt2", "clm", 12)]
)
def test_every_objective_learns_what_comes_next(architecture: str, objective: str, negatives: int) -> None:
    """Each item is the one after the last: by chance one in 27 is right."""
    torch.manual_seed(0)
    rows = [row for row in make_rows(150, seed=5) if row["length"] > 2]
    spec = SPEC.model_copy(
        update={"architecture": architecture, "objective": objective, "negatives": negatives, "context_sizes": {}}
    )
    model = build_model(spec, torch.from_numpy(item_counts(rows)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batch = make_batch(rows, SPEC.max_length)
    for _ in range(200):
        loss, count = model.loss(batch)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    model.eval()
    tested = [row for row in make_rows(100, seed=6) if 2 < row["length"] < SPEC.max_length]
    with torch.inference_mode():
        best = (model.encode(make_batch(tested, SPEC.history_length)) @ model.item_vectors().T)[:, 2:29].argmax(1) + 2
    expected = torch.tensor([(row["item_index"][-1] - 1) % 27 + 2 for row in tested])
    assert (best == expected).float().mean() > 0.5


def test_replacements_weigh_as_much_as_the_items_however_many_of_these_are_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, of_items = make_model(architecture="electra", objective="rtd"), []
    model.item_counts[2:16] = 0
    item_loss = model._item_loss
    monkeypatch.setattr(model, "_item_loss", lambda *given: of_items.append(item_loss(*given)) or of_items[-1])
    monkeypatch.setattr("training.model.F.binary_cross_entropy_with_logits", lambda *given: torch.tensor(7.0))
    with torch.inference_mode():
        total, count = model.loss(make_batch(ROWS, SPEC.max_length))
    assert of_items[0][1] == count > 0
    assert float(total - of_items[0][0]) == pytest.approx(7 * count, rel=1e-4)


def test_replacements_are_drawn_in_32_bits_under_autocast_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model, drawn_by = make_model(architecture="electra", objective="rtd"), []
    draw = model.masking.sample_from_softmax
    monkeypatch.setattr(
        model.masking, "sample_from_softmax", lambda scores: drawn_by.append(scores.dtype) or draw(scores)
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(make_batch(ROWS, SPEC.max_length))
    assert drawn_by == [torch.float32]
    assert loss.isfinite()


def test_replacements_are_drawn_as_transformers4rec_draws_them_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(architecture="electra", objective="rtd")
    masking, batch = model.masking, model.known(make_batch(ROWS, SPEC.max_length))
    targets = masking.compute_masked_targets(batch["item_index"], training=True).targets
    states = torch.randn((*targets.shape, SPEC.width))
    hidden, read = targets > 0, []
    embed = model._embed
    monkeypatch.setattr(model, "_embed", lambda rows: read.append(rows["item_index"]) or embed(rows))
    scores = states[hidden] @ model.table(targets[hidden]).detach().T
    torch.manual_seed(5)
    expected, _, _ = masking.get_fake_tokens(batch["item_index"], targets.flatten(), scores)
    torch.manual_seed(5)
    whole = model._replacement_loss(batch, states, targets)
    assert torch.equal(read[0], expected)
    sizes, draw = [], masking.sample_from_softmax
    monkeypatch.setattr(masking, "sample_from_softmax", lambda part: sizes.append(len(part)) or draw(part))
    monkeypatch.setattr("training.model._DRAWN_AT_ONCE", 3)
    assert model._replacement_loss(batch, states, targets).isfinite()
    assert whole.isfinite()
    assert max(sizes) == 3
    assert sum(sizes) == int(hidden.sum())


def test_what_the_model_has_not_learnt_is_read_as_unknown() -> None:
    model, batch = make_model(), make_batch(ROWS[:1], ROWS[0]["length"])
    unknown = {name: matrix.clone() for name, matrix in batch.items()}
    unknown["item_index"][0, 0] = unknown["vertical_index"][0, 0] = 1
    with torch.inference_mode():
        expected = model.encode(unknown)
        for item in (ITEMS - 1, ITEMS, ITEMS + 1000):  # in the table but never counted; newer than the model
            newer = {name: matrix.clone() for name, matrix in batch.items()}
            newer["item_index"][0, 0], newer["vertical_index"][0, 0] = item, CONTEXT_SIZES["vertical_index"]
            torch.testing.assert_close(model.encode(newer), expected)


ATTRIBUTES = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (2, ITEMS)))


def with_attributes(**changes: object) -> SequenceModel:
    torch.manual_seed(3)
    spec = SPEC.model_copy(update={"attribute_sizes": {"category": 4, "price": 4}, **changes})
    model = build_model(spec, torch.from_numpy(item_counts(make_rows(200))), ATTRIBUTES)
    with torch.no_grad():
        for part in model.table.parts:
            part.weight[1:] = torch.randn(3, spec.width)
    return model.eval()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_saved_and_loaded_is_the_same_model(tmp_path: Path, precision: str) -> None:
    model = with_attributes(negatives=5, item_precision=precision)
    assert model.table.own.weight.dtype == getattr(torch, precision)
    batch = make_batch(ROWS, SPEC.history_length)
    save_model(tmp_path, model, {"model_version": "v", "as_of": "2024-01-01T00:00:00"})
    about = read_about(tmp_path)
    assert (about["model_version"], about["spec"]["items"]) == ("v", ITEMS)
    vectors, cold = ItemVectors(tmp_path / "model.safetensors").of(np.arange(ITEMS), list(ATTRIBUTES.numpy()))
    np.testing.assert_array_equal(vectors, model.item_vectors().numpy())
    np.testing.assert_array_equal(cold, model.item_counts.numpy() == 0)
    with torch.inference_mode():
        loaded = load_model(tmp_path / "model.safetensors", model.spec)
        assert torch.equal(loaded.encode(batch), model.encode(batch))
    # The table stays where it is in the file: it is no copy in this process's memory.
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    place = loaded.table.own.weight.data_ptr()
    assert any(int(start, 16) <= place < int(end, 16) for start, end in (line[0].split("-") for line in maps))


def test_a_cold_items_vector_is_what_its_attributes_say(tmp_path: Path) -> None:
    model = with_attributes()
    save_model(tmp_path, model, {})
    table = ItemVectors(tmp_path / "model.safetensors")
    items, category, price = np.array([29, ITEMS, ITEMS + 7, 2]), np.array([1, 2, 99, 3]), np.array([0, 3, 0, 1])
    vectors, cold = table.of(items, [category, price])
    of_category, of_price = (part.weight.detach().numpy() for part in model.table.parts)
    assert cold.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(vectors[0], of_category[1])  # never counted, though it has a number
    np.testing.assert_array_equal(vectors[1], of_category[2] + of_price[3])
    assert not vectors[2].any()  # a category that came after the model
    # Of a known item, what was learnt, whatever its category and price are now.
    assert ATTRIBUTES[:, 2].tolist() != [category[3], price[3]]
    np.testing.assert_array_equal(vectors[3], model.item_vectors()[2].numpy())


def test_items_hidden_from_training_are_ranked_by_their_category(tmp_path: Path) -> None:
    """Each user stays within one of three categories; of each, training sees all items but two."""
    random = np.random.default_rng(0)
    items = np.arange(2, 2 + 27)
    category = (items - 2) % 3 + 1
    hidden = items[-6:]
    rows = []
    for user in range(200):
        own = items[(category == user % 3 + 1) & ~np.isin(items, hidden)]
        row = {name: [1] * SPEC.history_length for name in FEATURES}
        row["item_index"] = random.choice(own, SPEC.history_length).tolist()
        rows.append({**row, "length": SPEC.history_length})
    attributes = np.zeros((1, ITEMS), np.int64)
    attributes[0, items] = category
    torch.manual_seed(0)
    spec = SPEC.model_copy(update={"attribute_sizes": {"category": 4}, "item_dropout": 0.2})
    model = build_model(spec, torch.from_numpy(item_counts(rows[:150])), torch.from_numpy(attributes))
    optimizer, batch = torch.optim.AdamW(model.parameters(), lr=0.01), make_batch(rows[:150], SPEC.max_length)
    for _ in range(40):
        total, positions = model.loss(batch)
        optimizer.zero_grad()
        (total / positions).backward()
        optimizer.step()
    save_model(tmp_path, model.eval(), {})
    vectors, cold = ItemVectors(tmp_path / "model.safetensors").of(hidden, [category[-6:]])
    assert cold.all()
    with torch.inference_mode():
        scores = model.encode(make_batch(rows[150:], SPEC.history_length)).numpy() @ vectors.T
    best = category[-6:][scores.argmax(axis=1)]
    assert np.mean(best == [user % 3 + 1 for user in range(150, 200)]) > 0.9  # by chance a third


def test_a_grown_model_keeps_what_it_knew_and_reads_new_items_by_their_attributes() -> None:
    old, batch = with_attributes(), make_batch(ROWS, SPEC.history_length)
    items, counts = ITEMS + 5, torch.zeros(ITEMS + 5, dtype=torch.int64)
    counts[: ITEMS - 1] = old.item_counts[:-1]
    counts[10], counts[29], counts[ITEMS:] = 0, 7, 7  # 10 is gone, 29 was too rare for the old one, the last are new
    attributes = torch.nn.functional.pad(ATTRIBUTES, (0, 5), value=3)
    spec = old.spec.model_copy(update={"items": items, "attribute_sizes": {"category": 6, "price": 4}})
    new = build_model(spec, counts, attributes).eval()
    new.grow_from(old.tensors())
    half = build_model(spec.model_copy(update={"item_precision": "bfloat16"}), counts, attributes)
    half.grow_from(old.tensors())
    assert torch.equal(half.table.own.weight, new.table.own.weight.bfloat16())
    known = [item for item in range(2, 29) if item != 10]
    with torch.inference_mode():
        torch.testing.assert_close(new.item_vectors()[known], old.item_vectors()[known])
        torch.testing.assert_close(new.table(torch.tensor(10)), old.table(torch.tensor(10)))  # its row has stayed
        of_category, of_price = (part.weight for part in old.table.parts)
        expected = of_category[attributes[0, 29:]] + of_price[attributes[1, 29:]]
        torch.testing.assert_close(new.item_vectors()[29:], expected)
        kept = [row for row in range(len(ROWS)) if 10 not in ROWS[row]["item_index"]]
        torch.testing.assert_close(new.encode(batch)[kept], old.encode(batch)[kept])
    with pytest.raises(KeyError, match="transformer"):
        build_model(spec.model_copy(update={"layers": 2}), counts, attributes).grow_from(old.tensors())


@pytest.mark.parametrize("item_dropout", [0.0, 0.3])
def test_attributes_learn_to_stand_for_items_that_were_hidden(item_dropout: float) -> None:
    """Half of the items are of one category, and of these every other one is cheap. Both are those of the item before;
    of each kind some items are never seen."""
    torch.manual_seed(0)
    attributes = torch.zeros((2, ITEMS), dtype=torch.int64)
    attributes[0, 2:16], attributes[0, 16:30] = 1, 2
    attributes[1, 2::2], attributes[1, 3::2] = 1, 2
    random = np.random.default_rng(2)
    counts = torch.zeros(ITEMS, dtype=torch.int64)
    counts[2:12] = counts[16:26] = 9
    sizes = {"category": 3, "price": 3}
    spec = SPEC.model_copy(update={"attribute_sizes": sizes, "context_sizes": {}, "item_dropout": item_dropout})
    model = build_model(spec, counts, attributes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    firsts = random.choice([2, 3, 16, 17], 200)[:, None]
    items = torch.from_numpy(firsts + 2 * random.integers(0, 5, (200, SPEC.max_length)))
    batch = with_targets({name: items for name in FEATURES})
    for _ in range(60):
        loss, count = model.loss(batch)
        optimizer.zero_grad()
        (loss / count).backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        scores = model.encode({name: items[:, :7] for name in FEATURES}) @ model.item_vectors().T
    hidden = {2: [12, 14], 3: [13, 15], 16: [26, 28], 17: [27, 29]}
    for first, mine in hidden.items():
        of_kind = scores[torch.from_numpy(firsts[:, 0] == first)]
        others = [item for other, items in hidden.items() if other != first for item in items]
        assert (of_kind[:, mine].min(1).values > of_kind[:, others].max(1).values).all()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.json").unlink(), "model.json is missing"),
        (lambda folder: (folder / "model.json").write_text('{"spec"'), "not a description of a model"),
        (lambda folder: (folder / "model.json").write_text(json.dumps({"spec": {}})), "not a description of a model"),
        (lambda folder: (folder / "model.json").write_text("[" * 100_000), "not a description of a model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 900), "not the file that"),
    ],
)
def test_a_damaged_model_is_one_sentence(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    save_model(tmp_path, make_model(), {})
    damage(tmp_path)
    with pytest.raises(TrailvecError, match=says) as error:
        read_about(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_weights_that_are_no_model_are_one_sentence(tmp_path: Path) -> None:
    save_model(tmp_path, make_model(), {})
    with pytest.raises(TrailvecError, match="does not fit its description"):
        load_model(tmp_path / "model.safetensors", SPEC.model_copy(update={"width": 32}))
    save_weights(tmp_path, {"x": torch.zeros(1)})
    with pytest.raises(TrailvecError, match=r"holds no items \(.*table\.own\.weight\)"):
        ItemVectors(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TrailvecError, match="can't be read"):
        ItemVectors(tmp_path / "model.safetensors")
    (tmp_path / "alignment.json").write_text("[" * 100_000)
    with pytest.raises(TrailvecError, match=r"alignment\.json is not a report on a model's space"):
        read_alignment(tmp_path)
