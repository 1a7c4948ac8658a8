#!/usr/bin/env bash
# Builds the virtual environment VENV from requirements/lock.txt. Usage (from the root of the checkout):
#   requirements/install.sh PYTHON VENV cpu|cuda
# An existing VENV is replaced. pip fetches uv and, where it can, torch; uv installs the rest, since it needs seconds
# where pip needs a minute. No package index is named here: both tools use the ones they are configured with.
set -euo pipefail

python=$1
venv=$2
build=$3
lock=requirements/lock.txt

say() { echo "make venv: $*"; }
die() {
    echo "make venv: $*" >&2
    exit 1
}

case $build in
cpu | cuda) ;;
*) die "TORCH=$build: must be cpu or cuda. Fix: make venv TORCH=cpu" ;;
esac
found=$("$python" --version 2>&1) || die "PYTHON=$python: does not run ($found). Fix: make venv PYTHON=/path/to/python3.12"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "PYTHON=$python: is $found, but the suite needs Python 3.11 or newer. Fix: make venv PYTHON=python3.12"

pinned() { sed -nE "s/^$1==([^ ;]+).*/\1/p" "$lock"; }
torch=$(pinned torch)
started=$SECONDS

rm -rf "$venv"
"$python" -m venv "$venv" || die "$found could not make a virtual environment." \
    "On Debian and Ubuntu its venv module is a package of its own: apt-get install python3-venv"

export PIP_DISABLE_PIP_VERSION_CHECK=1
export DS_BUILD_OPS=0 # DeepSpeed compiles its extensions when they are first used, not here
pip() { "$venv/bin/python" -m pip -qq "$@"; }
uv_install() { "$venv/bin/uv" pip install --python "$venv/bin/python" "$@"; }

pip install --no-deps "uv==$(pinned uv)"

log=$venv/torch-install.log
if [ "$build" = cuda ]; then
    say "torch $torch with CUDA (several GB)"
    uv_install --constraints "$lock" "torch==$torch" || pip install --constraint "$lock" "torch==$torch" ||
        die "torch==$torch could not be installed; what failed is above."
elif [ "$(uname -s)" != Linux ]; then # other systems have one build, and it is a CPU build
    say "torch $torch"
    uv_install --no-deps "torch==$torch" || pip install --no-deps "torch==$torch" ||
        die "torch==$torch could not be installed; what failed is above."
else
    say "torch $torch+cpu"
    # pip first: it may be configured with an index of CPU builds; otherwise uv knows where they are.
    if ! pip install --no-deps --no-compile "torch==$torch+cpu" > "$log" 2>&1 &&
        ! uv_install --no-deps --torch-backend=cpu "torch==$torch" >> "$log" 2>&1; then
        cat "$log" >&2
        die "no CPU build of torch $torch: neither pip nor uv found one (their messages are above)." \
            "Check the network, or take the larger default build, which runs on a CPU too: make venv TORCH=cuda"
    fi
fi

# Not resolved again (--no-deps): the lock is complete, and nothing may put another torch in place of the one above.
rest=$venv/lock-without-torch.txt
grep -v '^torch==' "$lock" > "$rest"
say "$(grep -c '^[a-z]' "$rest") packages of $lock"
if ! uv_install --quiet --no-deps --build-constraints "$lock" -r "$rest"; then
    say "uv could not install them (above); trying pip, whose configuration may know another way"
    pip install --no-deps -r "$rest" || die "$lock could not be installed; what failed is above."
fi
"$venv/bin/uv" pip check --quiet --python "$venv/bin/python" || die "the packages of $lock contradict each other (above)."

# Once and on all cores, instead of by every rank of the first run at the same time. Some packages hold files that are
# not meant to compile; they are passed over.
"$venv/bin/python" -m compileall -q -j 0 "$venv" > /dev/null 2>&1 || true

echo "$build" > "$venv/torch-build"
say "$venv is ready after $((SECONDS - started)) s ($found, torch $build)"
