# Sourced by run.sh and test.sh: sets $python to an interpreter that has the requirement files named in its arguments.
# An active environment that already has torch is used, and torch in it is left alone; otherwise .venv is made and kept.

environment() {
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && python -c 'import torch' 2>/dev/null; then
        python=python
        python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9))' || {
            echo "the active environment has torch $(python -c 'import torch; print(torch.__version__)'); 2.9 or newer is needed" >&2
            exit 1
        }
    else
        python=.venv/bin/python
        [ -x "$python" ] || new_environment || exit 1
    fi
    local file wanted stamp
    stamp="$("$python" -c 'import sys; print(sys.prefix)')/.gpt2-requirements"
    wanted="$(cat "$@" | cksum)"
    grep -qxF "$wanted" "$stamp" 2>/dev/null && return
    echo "installing $* (once)"
    if [ "$python" = python ]; then
        cat "$@" | grep -v '^torch==' >"$stamp.txt"
        "$python" -m pip install --quiet --disable-pip-version-check -r "$stamp.txt" || exit 1
    else
        "$python" -m pip install --quiet --disable-pip-version-check -c constraints.txt $(printf -- '-r %s ' "$@") || exit 1
    fi
    echo "$wanted" >>"$stamp"
}

new_environment() {
    local candidate
    for candidate in python3 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            "$candidate" -m venv .venv && return
            rm -rf .venv
            echo "cannot make .venv with $candidate; install its venv module (Debian: apt install python3-venv)" >&2
            return 1
        fi
    done
    echo "no Python 3.11 or 3.12 found; install one, or activate an environment that has torch" >&2
    return 1
}
