#!/usr/bin/env bash
# Runs stages on YARN in cluster mode and waits for them to end; prints the driver's output, then one line with the
# application's id. Exits with 1 if it failed. If stopped (TERM, INT), it kills the application.
#   scripts/submit_yarn.sh run --conf conf/mine.toml --to build_sequences
#   scripts/submit_yarn.sh sessionize --conf conf/mine.toml --set sessionize.gap_minutes=45
#   scripts/submit_yarn.sh SCRIPT.py --conf conf/mine.toml ...       a Python file of your own, run the same way
# Ships a Python (scripts/package_environment.sh), trailvec itself (a wheel), and the configuration's folder, as conf/:
# mappings are resolved relative to it (conf/sources/...). All of spark.conf is passed to Spark.
# Environment variables:
#   HADOOP_CONF_DIR      the cluster
#   TRAILVEC_ENVIRONMENT the Python's archive, a file or a URI on the cluster (which nodes cache from job to job); or
#                        local:FOLDER, the archive unpacked into that folder on every node, so that no Python is
#                        shipped (default: built here, profile data)
#   TRAILVEC_ERASE_KEY, TRAILVEC_EXPORT_KEY  for the driver, which finds them through jobs/keys.py
set -euo pipefail
repository=$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Prefer the environment that scripts/setup.sh made, whatever the PATH; without one, use the PATH's.
[[ ! -x $repository/.venv/bin/python ]] || export PATH=$repository/.venv/bin:$PATH
# Spark would pass them on to every container, though they name folders of this machine.
unset PYTHONPATH PYSPARK_PYTHON PYSPARK_DRIVER_PYTHON CDPATH

fail() {
  printf 'submit_yarn: %s\n' "$*" >&2
  exit 1
}

[[ -d ${HADOOP_CONF_DIR-} ]] || fail "HADOOP_CONF_DIR does not name a folder: export it as the folder of the cluster's settings"
HADOOP_CONF_DIR=$(realpath "$HADOOP_CONF_DIR")
export HADOOP_CONF_DIR
job=${1:?the job is missing: give a stage, run or a Python file}
shift
conf=${TRAILVEC_CONF-}
arguments=()
while (($#)); do
  case $1 in
    --conf)
      (($# > 1)) || fail "--conf has no value: give --conf FILE"
      conf=$2
      shift
      ;;
    --conf=*) conf=${1#*=} ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
[[ -f $conf ]] || fail "the configuration ${conf:-(none)} does not exist: give --conf FILE"
conf=$(cd -P "$(dirname "$conf")" && pwd)/${conf##*/} # not the folder that a link of this name leads to
environment=${TRAILVEC_ENVIRONMENT-}
[[ -z $environment || $environment == *://* || $environment == local:* ]] || environment=$(realpath "$environment")
if [[ $job == *.py ]]; then
  main=$(realpath "$job")
  command=("--conf=conf/${conf##*/}" "${arguments[@]}")
  checked=(run "--conf=$conf")
else
  main=$repository/jobs/cli.py
  command=("$job" "--conf=conf/${conf##*/}" "${arguments[@]}")
  checked=("$job" "--conf=$conf" "${arguments[@]}")
fi

umask 077 # the settings may hold a key
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$repository"

# ---- what is shipped -------------------------------------------------------------------------------------

# Check the command line and find Java before anything is shipped.
python -m jobs.cli "${checked[@]}" --show-config >"$work/config.json"
JAVA_HOME=$(python -c '
from jobs.cli import guarded
from jobs.spark_session import java_home

raise SystemExit(guarded(lambda: print(java_home())))')
export JAVA_HOME
environment=${environment:-$(scripts/package_environment.sh data)}
archives=$work/trailvec.zip#trailvec,$work/conf.tar.gz#conf
if [[ $environment == local:* ]]; then
  python=${environment#local:}/bin/python3.11
else
  [[ $environment == *://* ]] || scripts/package_environment.sh check "$environment"
  python=./environment/bin/python3.11
  archives=$environment#environment,$archives
fi
uv build --quiet --python "$(command -v python)" --no-build-isolation --out-dir "$work/dist" . >&2
mv "$work"/dist/trailvec-*.whl "$work/trailvec.zip" # YARN unpacks files named *.zip
# Of links, what they lead to: the nodes do not have it.
(
  cd "${conf%/*}"
  { find -L . -type f -print0 || true; } | # it fails where links form a loop, after it has listed all
    tar --create --gzip --dereference --hard-dereference --null --files-from - --file "$work/conf.tar.gz"
)
# A variable would appear in the script that launches the driver, which nodes keep among the logs and whose bash expands
# $ and ` in it (jobs/keys.py). An archive like the others, because --files would override spark.files.
python -c '
import json, os

names = ("TRAILVEC_ERASE_KEY", "TRAILVEC_EXPORT_KEY")
print(json.dumps({name: os.environ[name] for name in names if os.environ.get(name)}))' >"$work/keys.json"
tar --create --gzip --directory "$work" --file "$work/keys.tar.gz" keys.json
archives+=,$work/keys.tar.gz#keys

# ---- Spark's settings -----------------------------------------------------------------------------------

spark_home=$(python -c 'import pyspark; print(pyspark.__path__[0])')
# Of the machine's own Spark only the settings are used: it may have another version, and lacks Delta. SPARK_ENV_LOADED
# skips its spark-env.sh, which would set SPARK_HOME again.
export SPARK_CONF_DIR=${SPARK_CONF_DIR:-${SPARK_HOME:-$spark_home}/conf} SPARK_HOME=$spark_home SPARK_ENV_LOADED=1
{
  # A properties file replaces the cluster's defaults, so copy them in first, without the locations of its jars and of its
  # Python, which would win over PYSPARK_PYTHON.
  sed -E '/^\s*spark\.(yarn\.(archive|jars)|pyspark\.(driver\.)?python|yarn\.appMasterEnv\.PYSPARK_DRIVER_PYTHON)\b/d' "$SPARK_CONF_DIR/spark-defaults.conf" 2>/dev/null || true
  echo # its last line may lack a newline
  for where in spark.yarn.appMasterEnv spark.executorEnv; do
    echo "$where.PYSPARK_PYTHON $python"
    echo "$where.PYTHONPATH ./trailvec"
    echo "$where.LC_ALL C.UTF-8"
    # For Python's temporary files: the folder that YARN creates in each container and removes with it.
    echo "$where.TMPDIR ./tmp"
  done
  echo "spark.yarn.appMasterEnv.TRAILVEC_KEYS keys/keys.json"
  python -c '
import json, sys

spark = json.load(sys.stdin)["spark"]
if spark["master"] != "yarn":
    sys.exit("submit_yarn: spark.master = %s is not yarn: extend conf/yarn.toml" % spark["master"])
for key, value in spark["conf"].items():
    print(key, value.replace("\\", "\\\\"))' <"$work/config.json"
} >"$work/spark.conf"

# ---- submit, wait, report --------------------------------------------------------------------------------

# `hadoop` and `yarn`, of which Spark's own jars hold only a part.
hadoop() {
  "$JAVA_HOME/bin/java" -Dfile.encoding=UTF-8 -Dsun.stdout.encoding=UTF-8 -cp "$HADOOP_CONF_DIR:$hadoop_jars/*:$spark_home/jars/*" \
    "$@" 2>>"$work/log"
}
# Airflow stops a task by TERM. The application must end too, or the next attempt would run beside it.
stop() {
  stopped=$1
  [[ -n $id ]] || return 0 # it may be submitted at this moment
  trap '' INT TERM
  if hadoop org.apache.hadoop.yarn.client.cli.ApplicationCLI application -kill "$id" >>"$work/log"; then
    echo "submit_yarn: stopped, and $id with it" >&2
    # Spark's client would remove this, but the signal ended it too (Ctrl-C and Airflow signal the process group).
    hadoop org.apache.hadoop.fs.FsShell -rm -r -f -skipTrash ".sparkStaging/$id" >>"$work/log" || true
  else
    echo "submit_yarn: stopped, but $id may still be running: run yarn application -kill $id" >&2
  fi
  exit "$stopped"
}

hadoop_jars=$(python -c 'import sys; print(sys.prefix)')/hadoop
id=
stopped=
trap 'stop 130' INT
trap 'stop 143' TERM
while read -r line; do
  printf '%s\n' "$line" >>"$work/log"
  if [[ -z $id && $line =~ Submitted\ application\ (application_[0-9_]+) ]]; then
    id=${BASH_REMATCH[1]}
    echo "submit_yarn: $id is submitted" >&2
    [[ -z $stopped ]] || stop "$stopped"
  fi
done < <(
  spark-submit --master yarn --deploy-mode cluster --name "trailvec ${job##*/}" --properties-file "$work/spark.conf" \
    --archives "$archives" "$main" "${command[@]}" 2>&1 && touch "$work/succeeded"
)
trap - INT TERM
[[ -z $stopped ]] || exit "$stopped"
[[ -n $id ]] || fail "nothing was submitted: $(grep -E 'Exception|Error' "$work/log" | head -n 1 || tail -n 1 "$work/log")"

# The output of the newest driver (the first container of an attempt), out of what YARN collected from all containers.
words='
  /^Container: / { id = $2; driver = id ~ /_000001$/ && id >= newest }
  /^LogContents:$/ && driver { newest = id; said = ""; inside = 1; next }
  /^End of LogType:/ { inside = 0 }
  inside && NF { said = said $0 "\n" }
  END { printf "%s", said }'
# The logs appear a moment after the end.
for _ in {1..10}; do
  hadoop org.apache.hadoop.yarn.client.cli.LogsCLI -applicationId "$id" -log_files stdout | awk "$words" >"$work/said" || true
  [[ ! -s $work/said ]] || break
  sleep 1
done
cat "$work/said"
if [[ -f $work/succeeded ]]; then
  echo "submit_yarn: $id succeeded" >&2
else
  why=$(grep '^trailvec: ' "$work/said" | tail -n 1) ||
    why="$(sed -n 's/.*diagnostics: //p' "$work/log" | tail -n 1), and the driver left no message (killed, or lost with its node): run this again; it resumes where it stopped"
  fail "$id failed: $why"
fi
