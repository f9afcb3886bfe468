#!/usr/bin/env bash
# Runs every stage on Complete Journey, then prints a summary. `make demo` has set everything up.
set -euo pipefail
cd "$(dirname "$0")/.."

# Exports hash user ids with a key from the environment. The demo generates one and keeps it, so that two runs give the
# same file; never keep a real key beside the data.
key=build/demo-export.key
if [[ -z ${TRAILVEC_EXPORT_KEY:-} ]]; then
  [[ -s $key ]] || (umask 077 && mkdir -p build && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$key")
  TRAILVEC_EXPORT_KEY=$(<"$key")
  export TRAILVEC_EXPORT_KEY
fi
exec .venv/bin/python scripts/demo.py "$@"
