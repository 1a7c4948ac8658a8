#!/usr/bin/env bash
# Writes requirements/lock.txt from the ranges of pyproject.toml. Usage (from the root of the checkout):
#   requirements/lock.sh UV [--upgrade | --upgrade-package NAME ...]
# Pins that still fit are kept unless an upgrade is asked for.
set -euo pipefail

uv=$1
shift
lock=requirements/lock.txt

# Moved by hand only: every other number of the suite depends on it, and a CPU build of exactly this version must exist.
torch=torch==2.13.0

# What the CUDA build of torch needs and the CPU build doesn't. torch itself pins these exactly.
cuda_only=(cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13)

new=$(mktemp)
trap 'rm -f "$new" "$new.pins"' EXIT
if [ -f "$lock" ]; then cp "$lock" "$new.pins"; fi
"$uv" pip compile pyproject.toml --quiet --all-extras --universal --python-version 3.11 --fork-strategy fewest \
    --constraints <(echo "$torch") --excludes <(printf '%s\n' "${cuda_only[@]}") \
    --no-header --annotation-style line "$@" --output-file "$new.pins" > /dev/null

cat > "$new" <<'HEADER'
# Written by `make lock` from pyproject.toml; `make venv` installs exactly this. Do not edit by hand.
#
# Every package of every extra, its dependencies included, one version for all of Python 3.11 to 3.13. What is not here:
# the CUDA libraries (nvidia-*, cuda-*) of torch's CUDA build. torch pins those exactly itself, and the CPU build,
# the suite's default, has none of them. `make venv` installs torch first, as its CPU build 2.13.0+cpu or, with
# TORCH=cuda, as the default one; both satisfy the pin below.
HEADER
sed -E -e 's#, -c /dev/fd/[0-9]+##' -e 's/moe-training-suite \(pyproject.toml\)/pyproject.toml/' "$new.pins" >> "$new"

# An unchanged lock keeps its date, so that `make` doesn't rebuild the environment for nothing.
if cmp -s "$new" "$lock"; then
    echo "$lock is up to date"
else
    cat "$new" > "$lock"
    echo "$lock written: git diff $lock, then carry changed direct pins over to environment.yml"
fi
