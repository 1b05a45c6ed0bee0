#!/usr/bin/env bash
# ./run.sh                          install, prepare the bundled text, train configs/quickstart.yaml
# ./run.sh CONFIG.yaml key=value …  train anything else; with several GPUs it starts one process on each
set -euo pipefail
cd "$(dirname "$0")"
source scripts/environment.sh
environment requirements.txt

config=configs/quickstart.yaml
case "${1:-}" in *.yaml) config="$1"; shift ;; esac

if grep -q 'data/tokens/sotu-gpt2-2048' "$config" 2>/dev/null; then
    "$python" -m data.prepare sample --tokenizer gpt2-2048 --out data/tokens/sotu-gpt2-2048
fi

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 1 ]; then
    exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$gpus" train_gpt2.py --config "$config" "$@"
fi
exec "$python" train_gpt2.py --config "$config" "$@"
