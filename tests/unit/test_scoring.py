"""training.scoring against SequenceModel.encode, and the batches and the flags that spark_udfs.encode makes of rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spark_udfs.encode import LoadedModel, _worker_model, by_length, encode_rows
from tests.sequence_files import CONTEXT_SIZES, ITEMS, MAX_LENGTH, SPEC, item_counts, make_rows, save_model
from training.batches import FEATURES
from training.checkpoint import load_model
from training.config import ModelSpec
from training.model import SequenceModel, build_model
from training.scoring import fast_encoder


def make_model(**changes: Any) -> SequenceModel:
    spec = ModelSpec.model_validate(SPEC.model_dump() | changes)
    attributes = [torch.arange(ITEMS) % size for size in spec.attribute_sizes.values()]
    counts = torch.from_numpy(item_counts(make_rows(200)))
    model = build_model(spec, counts, torch.stack(attributes) if attributes else None).eval()
    with torch.no_grad():  # fresh biases are zero, and so are the vectors of attributes: they would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def columns(rows: list[dict[str, Any]]) -> tuple[np.ndarray, list[np.ndarray]]:
    values = [np.concatenate([row[name] for row in rows]).astype(np.int32) for name in FEATURES]
    return np.array([row["length"] for row in rows]), values


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": 3, "heads": 4},
        {"context_sizes": {}, "attribute_sizes": {"category": 7}},
        {"context_sizes": {"hour": 25}, "attribute_sizes": {"category": 7, "vertical": 5}},
        {"context_sizes": {}},
        {"item_precision": "bfloat16", "width": 24},
        {"architecture": "bert", "objective": "mlm"},
    ],
)
def test_the_state_at_the_last_action_is_the_models_own(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = make_model(**changes)
    rows = make_rows(60, seed=3)
    rows[0]["item_index"][0], rows[1]["item_index"][0] = 5_000, 29  # numbers that the model has not learnt
    encode = fast_encoder(model)
    with torch.inference_mode():
        for _, batch in by_length(*columns(rows), model.spec.history_length, 16):
            tensors = {name: torch.from_numpy(matrix) for name, matrix in batch.items()}
            expected = model.encode({name: matrix.long() for name, matrix in tensors.items()})
            torch.testing.assert_close(encode(tensors), expected, rtol=1e-4, atol=1e-5)


def test_rows_of_like_length_go_together_and_a_long_one_keeps_its_newest_actions() -> None:
    rows = make_rows(100, seed=4)
    lengths, values = columns(rows)
    history = MAX_LENGTH - 2
    seen: list[int] = []
    for numbers, batch in by_length(lengths, values, history, 30):
        seen += numbers.tolist()
        for number, *of_row in zip(numbers, *batch.values(), strict=True):
            for name, row in zip(FEATURES, of_row, strict=True):
                kept = rows[number][name][-history:]
                assert row.tolist() == kept + [0] * (len(row) - len(kept))
    assert sorted(seen) == list(range(100))
    assert [min(lengths[n], history) for n in seen] == sorted(min(length, history) for length in lengths)
    assert CONTEXT_SIZES.keys() == set(FEATURES[1:])


def test_padding_is_counted_and_cold_rows_are_told() -> None:
    model = LoadedModel(make_model())
    rows = make_rows(3, seed=1)
    for row, items in zip(rows, ([2, 3], [1, 29, 777], [1, 1, 1, 2]), strict=True):
        row.update({name: (row[name] * 4)[: len(items)] for name in FEATURES}, item_index=items, length=len(items))
    vectors, cold, places = encode_rows(model, *columns(rows), batch_size=2)
    assert cold.tolist() == [False, True, False]
    assert places == 2 * 3 + 4
    assert np.isfinite(vectors).all()


def test_items_that_came_after_the_model_are_as_good_as_none() -> None:
    model = LoadedModel(make_model())
    model.knows[-2] = True  # the last item that the model has is one that it knows
    (row,) = make_rows(1)
    row.update({name: (row[name] * 4)[:2] for name in FEATURES}, item_index=[1, 777], length=2)
    assert encode_rows(model, *columns([row]), batch_size=2)[1].tolist() == [True]


def test_a_worker_loads_a_model_once_and_computes_with_one_thread(tmp_path: Path) -> None:
    save_model(tmp_path, make_model(), {"model_version": "m"})
    weights, threads = str(tmp_path / "model.safetensors"), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, again = (_worker_model(weights, SPEC.model_dump_json()) for _ in range(2))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert first is again


def test_a_loaded_models_weights_are_those_of_the_file_in_memory(tmp_path: Path) -> None:
    model = make_model()
    save_model(tmp_path, model, {"model_version": "m"})
    loaded = load_model(tmp_path / "model.safetensors", model.spec)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert mapped
    starts = [tuple(int(edge, 16) for edge in line.split()[0].split("-")) for line in mapped]
    place = loaded.table.own.weight.data_ptr()
    assert any(start <= place < end for start, end in starts)
    torch.testing.assert_close(loaded.table.own.weight, model.table.own.weight)
