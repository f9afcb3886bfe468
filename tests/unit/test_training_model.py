import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.errors import TrailvecError
from tests.sequence_files import CONTEXT_SIZES, ITEMS, SPEC, item_counts, make_rows
from training.batches import FEATURES, TARGET, pad
from training.checkpoint import load_model, read_about, read_vectors, save_model
from training.model import FrequencySampler, SequenceModel, build_model

ROWS = [row for row in make_rows(40) if row["length"] < SPEC.max_length]


def make_model(**changes: float) -> SequenceModel:
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


def test_user_times_item_is_the_score_of_transformers4recs_own_head() -> None:
    model, batch = make_model(), make_batch(ROWS, SPEC.history_length)
    with torch.inference_mode():
        own = model.network({name: batch[name] for name in FEATURES}, training=False, testing=False)
        ours = model.encode(batch) @ model.item_vectors().T
    assert own.shape == (len(ROWS), ITEMS)
    assert own.std() > 0.1
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)
    names = [name for name, _ in model.network.named_parameters() if "prediction_task" in name]
    assert names == []  # the head has nothing of its own: no bias


def test_loss_is_the_cross_entropy_of_every_known_next_item() -> None:
    model, batch = make_model(), make_batch(ROWS, SPEC.max_length)
    batch["item_index"][0, 0] = 1  # unknown as an input
    batch["item_index"][1, 1] = 1  # unknown as a target (and then as an input)
    batch = with_targets(batch)
    with torch.inference_mode():
        total, positions = model.loss(batch)
        expected, count = 0.0, 0
        for row in range(len(ROWS)):
            for end in range(1, ROWS[row]["length"]):
                target = int(batch["item_index"][row, end])
                if target != 1:
                    prefix = {name: matrix[row : row + 1, :end] for name, matrix in batch.items()}
                    scores = model.encode(prefix)[0] @ model.item_vectors().T
                    expected += float(torch.logsumexp(scores, 0) - scores[target])
                    count += 1
    assert positions == count
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_a_batch_without_targets_has_no_loss() -> None:
    for negatives in (0, 5):
        loss, positions = make_model(negatives=negatives).loss(make_batch([r for r in ROWS if r["length"] == 1], 7))
        assert (float(loss), positions) == (0, 0)


def test_a_row_has_the_same_vector_whatever_its_neighbours() -> None:
    model = make_model()
    with torch.inference_mode():
        together = model.encode(make_batch(ROWS, SPEC.history_length))
        alone = torch.cat([model.encode(make_batch([row], row["length"])) for row in ROWS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert torch.pdist(alone).max() > 0.1


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


def test_sampler_draws_as_often_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = torch.tensor([0, 0, 50, 5, 0, 30, 1])
    sampler, rounds = FrequencySampler(counts, draws=3), 20_000
    torch.manual_seed(0)
    drawn_in = torch.zeros(len(counts))
    for _ in range(rounds):
        drawn, _, _ = sampler.sample(torch.tensor([2]))
        assert len(drawn) == len(set(drawn.tolist()))
        drawn_in[drawn] += 1
    assert drawn_in[[0, 1, 4]].sum() == 0
    expected = [1 - (1 - count / 86) ** 3 for count in counts.tolist()]
    # Four standard deviations of a share over so many rounds.
    np.testing.assert_allclose(drawn_in / rounds, expected, atol=4 * np.sqrt(0.25 / rounds))
    monkeypatch.setattr(torch, "rand", torch.zeros)  # the smallest number that it can give
    assert sampler.sample(torch.tensor([2]))[0].tolist() == [2]
    monkeypatch.undo()
    targets = torch.tensor([5, 2, 5, 6])
    drawn, of_targets, of_drawn = sampler.sample(targets)
    np.testing.assert_allclose(of_targets, [expected[item] for item in targets], rtol=1e-5)
    np.testing.assert_allclose(of_drawn, [expected[item] for item in drawn], rtol=1e-5)


def test_sampled_loss_uses_the_drawn_items_and_their_chances(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(negatives=6), make_batch(ROWS[:5], SPEC.max_length)
    drawn = torch.tensor([3, 9, 20])
    share = model.item_counts / model.item_counts.sum()
    chance = 1 - (1 - share.double()) ** 6
    monkeypatch.setattr(torch.Tensor, "unique", lambda self: drawn)
    with torch.inference_mode():
        total, positions = model.loss(batch)
        expected, count = 0.0, 0
        for row, values in enumerate(ROWS[:5]):
            for end in range(1, values["length"]):
                target = values["item_index"][end]
                state = model.encode({name: matrix[row : row + 1, :end] for name, matrix in batch.items()})[0]
                items = [target, *(item for item in drawn.tolist() if item != target)]
                scores = (model.item_vectors()[items] @ state).double() - chance[items].log()
                expected += float(torch.logsumexp(scores, 0) - scores[0])
                count += 1
    assert positions == count > 0
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_saved_and_loaded_is_the_same_model(tmp_path: Path) -> None:
    model, batch = make_model(negatives=5), make_batch(ROWS, SPEC.history_length)
    save_model(tmp_path, model, {"model_version": "v", "as_of": "2024-01-01T00:00:00"})
    about = read_about(tmp_path)
    assert (about["model_version"], about["spec"]["items"]) == ("v", ITEMS)
    vectors, counts = read_vectors(tmp_path)
    with torch.inference_mode():
        np.testing.assert_array_equal(vectors, model.item_vectors().numpy())
        np.testing.assert_array_equal(counts, model.item_counts.numpy())
        loaded = load_model(tmp_path / "model.safetensors", model.spec)
        assert torch.equal(loaded.encode(batch), model.encode(batch))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "model.json").unlink(), "model.json is missing"),
        (lambda folder: (folder / "model.json").write_text('{"spec"'), "no description of a model"),
        (lambda folder: (folder / "model.json").write_text(json.dumps({"spec": {}})), "no description of a model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 900), "not the file that"),
    ],
)
def test_a_damaged_model_is_one_sentence(tmp_path: Path, damage, says: str) -> None:
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
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TrailvecError, match="can't be read"):
        read_vectors(tmp_path)
