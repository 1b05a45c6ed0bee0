#!/usr/bin/env bash
# ./run.sh                          install, prepare the bundled text, train configs/quickstart.yaml
# ./run.sh CONFIG.yaml key=value …  train anything else; with several GPUs it starts one process on each
# ./run.sh --from-run DIR …         any other arguments of train_gpt2.py
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
environment requirements.txt

arguments=(--config configs/quickstart.yaml "$@")
case "${1:-}" in
    *.yaml) arguments=(--config "$@") ;;
    --*) arguments=("$@") ;;
esac
bundled=data/tokens/sotu-gpt2-2048
if [ "${arguments[0]}" = --config ] && grep -q "$bundled" "${arguments[1]:-}" 2>/dev/null; then
    "$python" -m data.prepare sample --tokenizer gpt2-2048 --out "$bundled" >&2
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    "$python" train_gpt2.py "${arguments[@]}" --print-config >/dev/null # a mistake is told once, and not by every rank
    exec "$python" -m scripts.launch --standalone --nproc_per_node="$gpus" train_gpt2.py "${arguments[@]}"
fi
exec "$python" train_gpt2.py "${arguments[@]}"
