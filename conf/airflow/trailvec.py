"""trailvec's four jobs for Airflow 2, task by task those of conf/databricks: copy this file into the `dags` folder.

Airflow's variables say how a stage is started on its workers (they need no trailvec among Airflow's own packages):
  trailvec_home   the folder that the configuration's relative paths start from (storage.root, ingest.sources, .venv/s3
                  of conf/s3.toml): mostly the checkout, /opt/trailvec. Airflow itself would start a task in a folder
                  that it deletes afterwards, a relative warehouse with it
  trailvec_run    the command before the stage's name: /opt/trailvec/.venv/bin/trailvec, or
                  /opt/trailvec/scripts/submit_yarn.sh
  trailvec_conf   the configuration, an absolute path
The rest comes from the workers' environment: TRAILVEC_ERASE_KEY, TRAILVEC_EXPORT_KEY, and on YARN HADOOP_CONF_DIR and
TRAILVEC_ENVIRONMENT, one Python with requirements.lock for all four jobs (the archive of profile `full`, unpacked on
every node, local:/opt/trailvec-python, or on HDFS): what scripts/submit_yarn.sh packs without it has no PyTorch, and
training and scoring fail.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from airflow import DAG
from airflow.operators.bash import BashOperator

# job: (schedule in UTC, seconds that a run may take, stage → how often it is tried again)
JOBS = {
    "data": (
        "0 1 * * *",
        21600,
        {"ingest": 2, "flag_users": 2, "sessionize": 2, "build_vocabulary": 2, "build_sequences": 2},
    ),
    # Tuesdays: the cutoffs move on Mondays, and the data job of that night is the first that sees the whole week.
    # align: what it refuses it refuses again, somebody has to look.
    "training": ("0 6 * * TUE", 172800, {"train": 3, "align": 0}),
    "scoring": (
        "0 4 * * *",
        28800,
        {
            "embed_items": 2,
            "evaluate": 2,
            "score_users": 2,
            "find_neighbours": 2,
            "export_segments": 2,
            "write_report": 2,
        },
    ),
    "upkeep": ("0 12 * * SAT", 43200, {"maintain_tables": 1}),
}

COMMAND = (
    "cd '{{ var.value.trailvec_home }}' && "
    "exec {{ var.value.trailvec_run }} STAGE --conf '{{ var.value.trailvec_conf }}'"
)

for job, (schedule, seconds, stages) in JOBS.items():
    with DAG(
        dag_id=f"trailvec_{job}",
        schedule=schedule,
        start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
        catchup=False,  # a stage takes all that is new, however many nights were missed
        max_active_runs=1,  # two ingests of one source refuse each other
        dagrun_timeout=timedelta(seconds=seconds),
        default_args={"owner": "trailvec", "retry_delay": timedelta(minutes=2)},
        doc_md=__doc__,
        tags=["trailvec"],
    ):
        before = None
        for stage, retries in stages.items():
            task = BashOperator(
                task_id=stage,
                bash_command=COMMAND.replace("STAGE", stage),
                retries=retries,  # a stage that is run again goes on where it was
            )
            if before is not None:
                before >> task
            before = task
