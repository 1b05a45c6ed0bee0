#!/usr/bin/env bash
# ./run.sh                                install, prepare the bundled text, train configs/quickstart.yaml
# ./run.sh CONFIG.yaml key=value …        train anything else; with several GPUs it starts one process on each
# ./run.sh configs/sweeps/NAME.yaml …     a sweep and its report, with the arguments of python -m scripts.sweep
# ./run.sh --from-run DIR …               any other arguments of train_gpt2.py
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh

arguments=(--config configs/quickstart.yaml "$@") sweep=
case "${1:-}" in
    configs/sweeps/*.yaml | */configs/sweeps/*.yaml) arguments=(--config "$@") sweep=$1 ;;
    *.yaml) arguments=(--config "$@") ;;
    --*) arguments=("$@") ;;
esac
environment requirements.txt ${sweep:+requirements-extra.txt}

bundled=data/tokens/sotu-gpt2-2048 file=
if [ "${arguments[0]}" = --config ]; then file=${arguments[1]:-}; fi
for _ in {1..5}; do # the configuration, and those that it is built on
    [ -f "$file" ] || break
    if grep -q "$bundled" "$file"; then
        "$python" -m data.prepare sample --tokenizer gpt2-2048 --out "$bundled" >&2
        break
    fi
    file="$(dirname "$file")/$(sed -n 's/^base: *\([^ ]*\).*/\1/p' "$file")"
done
if [ -n "$sweep" ]; then exec "$python" -m scripts.sweep "$@"; fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    "$python" train_gpt2.py "${arguments[@]}" --print-config >/dev/null # a mistake is told once, and not by every rank
    exec "$python" -m scripts.launch --standalone --nproc_per_node="$gpus" train_gpt2.py "${arguments[@]}"
fi
exec "$python" train_gpt2.py "${arguments[@]}"
