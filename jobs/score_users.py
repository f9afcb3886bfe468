"""score_users: sequences (split = score) + the model in use → user_embeddings, current_model.

- Model already scored: only users whose sequence changed since, from the change data feed of sequences, or by comparing
  two versions if the table was rebuilt. One MERGE; users who have disappeared lose their vector.
- New model: all users, in chunks by a hash of user_id, one commit per chunk with a note of it. A run that finds some
  chunks done scores the rest at the same version of sequences, but for users who have left since, then applies what
  has changed since.
- Current model retrained to other weights: it must pass the checks of a new model; then all users in one commit,
  because the model is being read meanwhile.
- Forced, with vectors in the table: all users in one commit, which replaces whatever rows the model had.

Last, the single row of current_model changes: readers of current_user_embeddings see all of the old model before that,
and all of the new one afterwards. Vectors of old models stay until `trailvec retire_model`. If a history is longer than
the model reads (one action less than sequences.max_length), the newest actions count.
How and why: docs/decisions/0012.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from jobs import align, evaluate
from jobs.cli import stage_main
from jobs.errors import TrailvecError
from jobs.model_folders import check_items, check_numbers, description, model_folder, model_inputs, trained_again
from jobs.models import encode_sequences
from jobs.progress import meanwhile
from jobs.runtime import Runtime, Stage, changed_by_another_run
from jobs.spark_session import broadcast_if_few, persisted, spark_conf
from jobs.tables import CURRENT_MODEL, ITEM_EMBEDDINGS, SEQUENCES, USER_EMBEDDINGS, of_model
from spark_udfs.encode import Counts, Summed
from training.batches import FEATURES
from training.checkpoint import read_about, read_alignment, read_description, rotation_sha256

MAX_CHUNKS = 4
SECONDS_BETWEEN_LINES = 5.0
# 16 MB of sequences per task is some seconds of work; Spark's default of 128 MB suits lighter work.
# Larger Arrow batches: with Spark's default of 10,000 rows there would be twice as much padding.
SPLIT = {
    "spark.sql.files.maxPartitionBytes": str(16 * 1024 * 1024),
    "spark.sql.execution.arrow.maxRecordsPerBatch": "32768",
}


# ---- progress so far -----------------------------------------------------------------------------------


def changed_users(before: DataFrame, now: DataFrame) -> DataFrame:
    """The users (user_id) whose row to score has changed, appeared or disappeared."""
    content = F.xxhash64("as_of", *FEATURES)
    both = now.select("user_id", content.alias("now")).join(
        before.select("user_id", content.alias("before")), "user_id", "full"
    )
    return both.where(~F.col("now").eqNullSafe(F.col("before"))).select("user_id")


@dataclass(frozen=True)
class Scoring:
    """How far the scoring of one model has come, according to the notes in user_embeddings' commits.

    Attributes:
        sequences: the version of sequences from which the vectors are computed.
        chunks: the number of chunks; a user's chunk is a hash of their id.
        done: the numbers of the committed chunks.
        into_empty: the table had no vectors of the model at the start, so chunks only append rows.
        after: the newest version of user_embeddings, before the scoring's own commits, that may have changed the
            model's vectors (`begun_after`).
    """

    sequences: int
    chunks: int
    done: frozenset[int]
    into_empty: bool
    after: int = 0


def commits_of(runtime: Runtime, version: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The commits to user_embeddings that may have changed the model's vectors, newest first: number and note.

    The note is None if something other than trailvec made the commit, or a run that read an earlier table named
    sequences: its versions held other rows.
    """
    for commit in runtime.commits(USER_EMBEDDINGS):
        provenance = commit.provenance or {}
        note = provenance.get("note") or {}
        if commit.foreign or note.get("model", {}).get("version") == version:
            yield commit.version, note if note and runtime.read_these(provenance) else None


def of_one_scoring(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two notes are of chunks that together are one scoring."""
    if one is None or other is None:
        return False
    return all(one.get(key) == other.get(key) for key in ("model", "sequences", "chunks"))


def newest_of_others(runtime: Runtime, version: str, note: dict[str, Any] | None = None) -> int | None:
    """The newest commit that may have changed the model's vectors and is not of the scoring that left this note."""
    return next((number for number, said in commits_of(runtime, version) if not of_one_scoring(said, note)), None)


def begun_after(runtime: Runtime, version: str, note: dict[str, Any] | None = None) -> int:
    """`Scoring.after` of the scoring that left this note; None: of one that begins now."""
    newest = newest_of_others(runtime, version, note)
    if newest is not None:
        return newest
    # All commits of which the log no longer tells came before its oldest.
    return min((commit.version for commit in runtime.commits(USER_EMBEDDINGS)), default=0)


def scoring_so_far(runtime: Runtime, model: dict[str, Any]) -> Scoring | None:
    """How far an earlier run came with this very model; None if there is nothing to resume."""
    notes = (note for _, note in commits_of(runtime, model["version"]))
    newest = None if runtime.forced else next(notes, None)
    if newest is None or newest["model"] != model:
        return None
    if runtime.followed(USER_EMBEDDINGS, SEQUENCES, newest["sequences"]) is None:
        return None
    of_scoring = takewhile(lambda note: of_one_scoring(note, newest), notes)
    done = frozenset(note["chunk"] for note in chain((newest,), of_scoring) if note)
    # Chunks' ids are made of it: not asked of the log again, since once Delta has cleaned that, the answer is another.
    stored = newest["into_empty"] and "after" in newest
    if stored and (newest_of_others(runtime, model["version"], newest) or 0) > newest["after"]:
        return None  # others have changed the vectors between its chunks, whose ids are used up
    after = newest["after"] if stored else begun_after(runtime, model["version"], newest)
    return Scoring(newest["sequences"], newest["chunks"], done, newest["into_empty"], after)


# ---- the stage ----------------------------------------------------------------------------------------


class Scorer:
    """One run of the stage: its writes and its progress messages."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._folder = model_folder(runtime)
        self.version = self._folder.name
        about = read_about(self._folder)
        check_numbers(runtime, about)  # before the gate, whose advice would be useless
        self.model = {
            "version": self.version,
            "weights": about["weights_sha256"],
            "rotation": rotation_sha256(self._folder),
            "revision": USER_EMBEDDINGS.revision,
        }
        self.counts: Counts = runtime.spark.sparkContext.accumulator([0, 0, 0, 0], Summed())
        self.started = time.monotonic()

    def rows(self, version: int) -> DataFrame:
        version = self._runtime.past_upkeep(SEQUENCES, version)
        return self._runtime.at(SEQUENCES, version).where("split = 'score'")

    def vectors(self) -> DataFrame:
        """The model's rows now in the table."""
        return of_model(self._runtime.latest(USER_EMBEDDINGS), self.version)

    def score_all(self, scoring: Scoring) -> None:
        """Writes the missing chunks."""
        missing = [number for number in range(scoring.chunks) if number not in scoring.done]
        if not missing:
            return
        rows = self.rows(scoring.sequences)
        total = rows.count()
        if scoring.sequences != (now := self._runtime.version(SEQUENCES)):
            # An erased user must not come back, not even until `score_changed`.
            gone = rows.select("user_id").join(self.rows(now), "user_id", "left_anti").localCheckpoint(eager=False)
            rows = rows.join(broadcast_if_few(gone), "user_id", "left_anti")
        with (
            self._reporting_progress(total, total * len(missing) // scoring.chunks),
            spark_conf(self._runtime.spark, SPLIT),
        ):
            for number in missing:
                self._score_chunk(scoring, rows, number)

    def _score_chunk(self, scoring: Scoring, rows: DataFrame, number: int) -> None:
        mine = F.pmod(F.xxhash64("user_id"), F.lit(scoring.chunks)) == number
        note = self._note(scoring, number)
        chunk = self._encode(rows.where(mine) if scoring.chunks > 1 else rows)
        if scoring.into_empty:
            # Of several runs that began after the same commit, Delta lets one write the chunk.
            batch = (f"{self.version} after {scoring.after}", number)
            self._runtime.append(USER_EMBEDDINGS, chunk, batch=batch, done=False, note=note)
            if (newest_of_others(self._runtime, self.version, note) or 0) > scoring.after:
                raise changed_by_another_run(USER_EMBEDDINGS, "while this one worked on it")
            return
        if scoring.chunks == 1:
            with persisted(chunk):  # so that a conflict with other jobs costs no second encoding
                of = {"model_version": self.version}
                self._runtime.write(USER_EMBEDDINGS, chunk, done=False, note=note, of=of)
        else:
            self._merge(chunk, self.vectors().where(mine), done=False, note=note)
        self.refuse_older_vectors(scoring)

    def refuse_older_vectors(self, scoring: Scoring, done: bool = False) -> None:
        """Raises TrailvecError if another run has written vectors of older sequences, or by other weights, since the
        scoring began: an increment from it would miss them. (Newer ones are as right as its own.)

        Args:
            done: the increment is written, so the next run must not go on from it.
        """
        self._runtime.latest_version(USER_EMBEDDINGS)  # others may have written
        later = takewhile(lambda commit: commit[0] > scoring.after, commits_of(self._runtime, self.version))
        if any(s is None or s["model"] != self.model or s["sequences"] < scoring.sequences for _, s in later):
            if done:  # a note of no weights: all users are scored anew
                self._runtime.touch(USER_EMBEDDINGS, note={"model": {"version": self.version}}, done=False)
            raise changed_by_another_run(USER_EMBEDDINGS, "while this one worked on it")

    def score_changed(self, since: int) -> None:
        """Applies what changed in sequences after its version `since`, in one MERGE."""
        runtime, now = self._runtime, self._runtime.version(SEQUENCES)
        note = self._note(Scoring(now, 1, frozenset(), into_empty=False), 0)
        if since == now:
            runtime.touch(USER_EMBEDDINGS, note=note)
            return
        changes = runtime.changes(SEQUENCES, since)
        if changes is None:
            users = changed_users(self.rows(since), self.rows(now))
        else:
            users = changes.where("split = 'score'").select("user_id").distinct()
        with persisted(users):
            total = users.count()
            if total:
                with self._reporting_progress(total, total):
                    rows = self.rows(now).join(users, "user_id", "left_semi")
                    self._merge(self._encode(rows), users, done=True, note=note)
            else:
                runtime.touch(USER_EMBEDDINGS, note=note)

    def refuse_if_overtaken(self, compared_with: str | None) -> None:
        """Raises TrailvecError if another model has become current than the one that this model was compared with
        (`check_successor`), or if this one was trained or aligned again, so that its vectors may be of two spaces."""
        if (now := self._runtime.newest_current_model()) not in (compared_with, self.version):
            raise TrailvecError(
                f"model {now} has become current while this run scored, and {self.version} was not compared with it: "
                f"run this again if {self.version} is to follow it, or else set model.version = {now}"
            )
        folder = model_folder(self._runtime, self.version)  # brings a local copy up to date
        weights = read_description(folder)["weights_sha256"]
        if (weights, rotation_sha256(folder)) != (self.model["weights"], self.model["rotation"]):
            raise TrailvecError(
                f"model {self.version} was trained or aligned again while this run scored: run this again, which "
                f"scores all its users anew"
            )

    def make_current(self) -> None:
        """Switches over: from here on, readers of the views see this model.

        Raises:
            TrailvecError: a user has no vector, or more than one.
        """
        users, vectors = self.rows(self._runtime.version(SEQUENCES)).count(), self.vectors().count()
        if users != vectors:
            self._runtime.touch(USER_EMBEDDINGS, done=False)  # else the stage would count as up to date
            if vectors < users:
                mend = (
                    "(was somebody erased meanwhile?): run `trailvec score_users` again or, if that says the same, "
                    "with --force"
                )
            else:
                mend = (
                    "(did two jobs write to it at once?): run `trailvec score_users --force` once no other run of it "
                    "goes on"
                )
            raise TrailvecError(
                f"table user_embeddings has {vectors:,} vectors of model {self.version} for {users:,} users {mend}"
            )
        if self._runtime.newest_current_model() == self.version:
            self._runtime.touch(CURRENT_MODEL)
        else:
            row = self._runtime.spark.createDataFrame([(self.version,)], CURRENT_MODEL.schema())
            self._runtime.write(CURRENT_MODEL, row.coalesce(1))

    def _encode(self, rows: DataFrame) -> DataFrame:
        vectors = encode_sequences(
            self._runtime, rows, ["user_id", "as_of"], model_dir=self._folder, counts=self.counts
        )
        return vectors.withColumn("model_version", F.lit(self.version))

    def _merge(self, new: DataFrame, users: DataFrame, done: bool, note: dict[str, Any]) -> None:
        """Writes the vectors `new`; a user of `users` (user_id) without a new vector loses theirs, if they have one."""
        gone = users.select("user_id", F.lit(self.version).alias("model_version")).join(new, "user_id", "left_anti")
        of_this = F.col("old.model_version") == self.version
        with persisted(new):  # Delta reads it twice
            self._runtime.merge(USER_EMBEDDINGS, new, deletes=gone, where=of_this, done=done, note=note)

    def _note(self, scoring: Scoring, chunk: int) -> dict[str, Any]:
        facts = {name: getattr(scoring, name) for name in ("sequences", "chunks", "into_empty", "after")}
        return {"model": self.model, **facts, "chunk": chunk}

    def _reporting_progress(self, total: int, to_do: int) -> AbstractContextManager[None]:
        """Reports every few seconds how many of `total` users are done, until the block ends; it encodes `to_do` of
        them."""
        started, before = time.monotonic(), self.counts.value[0]

        def report() -> None:
            line = progress_line(self.counts.value[0] - before, to_do, total, time.monotonic() - started)
            self._runtime.on_progress(line)

        return meanwhile(report, SECONDS_BETWEEN_LINES)


def progress_line(users: int, to_do: int, total: int, seconds: float) -> str:
    """`users` of `to_do` were encoded in that time; the others of `total` had been done before."""
    done = f"{total - to_do + users:,} of {total:,} users"
    if not users:  # tasks report their counts when they end
        return f"{done}, first tasks running"
    rate = users / seconds
    seconds_left = round(max(to_do - users, 0) / rate)
    return f"{done}  {rate:,.0f} users/s  {seconds_left // 60}:{seconds_left % 60:02} left"


def was_scored(runtime: Runtime, version: str) -> bool:
    """Whether all users once had a vector of the model's present weights, so that it has passed the gate before. The
    notes in user_embeddings' commits tell; if none of them is left, any row of the model counts as a yes."""
    now = description(runtime, version).get("weights_sha256")  # None: the model's folder is gone
    told = (
        (provenance["note"], provenance["fingerprint"] is not None)
        for provenance in runtime.noted(USER_EMBEDDINGS)
        if provenance["note"]["model"]["version"] == version
    )
    newest = next(told, None)
    if newest is not None:
        return any(
            done and ("chunks" in note or note["model"].get("scored"))  # a run's last commit, or retire_model's
            for note, done in chain((newest,), told)
            if now in (None, note["model"].get("weights", note["model"].get("of", now)))  # `of`: by retire_model
        )
    return runtime.exists(USER_EMBEDDINGS) and not of_model(runtime.latest(USER_EMBEDDINGS), version).isEmpty()


def check_successor(runtime: Runtime, version: str, again: bool) -> str | None:
    """Checks whether the model may become current.

    Args:
        again: it was retrained after its vectors were computed, so it is checked even if it is the current model.

    Returns:
        The current model, which it was compared with.

    Raises:
        TrailvecError: it fails a check, or a check has not been run yet.
    """
    runtime.create(CURRENT_MODEL)
    current = runtime.newest_current_model()
    if current == version and not again:
        return current
    comes_back = not again and was_scored(runtime, version)
    # For a model that passed before, today's evaluation window is no reason to keep a worse one current.
    if not comes_back and (why := evaluate.refusal(runtime, version)):
        raise TrailvecError(why)
    if current is None:
        return None
    report = read_alignment(model_folder(runtime))
    if report is None:
        raise TrailvecError(f"model {version} is not aligned with {current} yet: run `trailvec align` first")
    # A model that comes back keeps its vectors, whichever model it was aligned to then.
    if (onto := report["onto"]) != current and not comes_back:
        raise TrailvecError(
            f"model {version} was compared with {onto or 'no model'}, and {current} has become current since: "
            f"run `trailvec align --force` and `trailvec embed_items` first"
        )
    if why := align.refusal(report, runtime.config.align):
        raise TrailvecError(why)
    # If no model has item vectors, there is nothing that the user vectors could mismatch.
    if runtime.exists(ITEM_EMBEDDINGS) and align.has_no_items(runtime, version):
        raise TrailvecError(f"model {version} has no item vectors yet: run `trailvec embed_items` first")
    return current


def run(runtime: Runtime) -> None:
    scorer = Scorer(runtime)
    again = trained_again(runtime, model_folder(runtime))
    compared_with = check_successor(runtime, scorer.version, again)
    check_items(runtime, scorer.version)
    runtime.create(USER_EMBEDDINGS)
    now, begun_at = runtime.version(SEQUENCES), runtime.latest_version(USER_EMBEDDINGS)
    scoring = scoring_so_far(runtime, scorer.model)
    if scoring is None:
        # As of the commits that `begun_after` reads: a run beside this one may write between the two.
        into_empty = of_model(runtime.at(USER_EMBEDDINGS, begun_at), scorer.version).isEmpty()
        chunks = min(MAX_CHUNKS, -(-scorer.rows(now).count() // runtime.config.score.chunk_users) or 1)
        if again and runtime.newest_current_model() == scorer.version:
            chunks = 1  # readers would see vectors of two trainings mixed
        if runtime.forced and not into_empty:
            chunks = 1  # whatever rows the model has are replaced
        scoring = Scoring(now, chunks, frozenset(), into_empty, begun_after(runtime, scorer.version))
    scorer.score_all(scoring)
    scorer.refuse_if_overtaken(compared_with)  # before the commit by which the model counts as scored
    scorer.refuse_older_vectors(scoring)
    scorer.score_changed(scoring.sequences)
    scorer.refuse_older_vectors(scoring, done=True)
    scorer.refuse_if_overtaken(compared_with)
    scorer.make_current()

    users, cold, actions, places = scorer.counts.value
    rate = users / (time.monotonic() - scorer.started)
    runtime.report.rows_out["users_encoded"] = users
    runtime.report.notes.append(
        f"model {scorer.version}: {users:,} users encoded ({rate:,.0f} users/s), {cold:,} of them cold, "
        f"padding {1 - actions / places if places else 0:.1%}"
    )


STAGE = Stage(
    "score_users",
    "write the vectors of the users whose actions changed, or of all users for a new model",
    run,
    reads=(SEQUENCES,),
    writes=(USER_EMBEDDINGS, CURRENT_MODEL),
    settings=(),  # score.* changes the speed, not the vectors
    also="It also reads the model and, before making it current, its alignment.json, item_embeddings and, for "
    "evaluate.gate, evaluation.",
    inputs=model_inputs,
)


def main() -> None:
    stage_main("score_users")


if __name__ == "__main__":
    main()
