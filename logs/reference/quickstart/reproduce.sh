#!/usr/bin/env bash
# The table and figure of this folder: Muon and AdamW at four learning rates and three seeds, 24 runs of quickstart.yaml.
# A run takes about four minutes on one core. Started several times it shares the runs among the cores.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=1
source scripts/environment.sh
environment requirements.txt requirements-extra.txt
"$python" -m data.prepare sample --tokenizer gpt2-2048 --out data/tokens/sotu-gpt2-2048

train() {
    local dir="logs/quickstart_table/$1"
    shift
    mkdir -p "$(dirname "$dir")"
    mkdir "$dir" 2>/dev/null || return 0
    "$python" train_gpt2.py --config configs/quickstart.yaml run_dir="$dir" sample.tokens=0 train.inspect_every=0 "$@"
}

for seed in 0 1 2; do
    for lr in 0.005 0.01 0.02 0.04; do
        train "muon-$lr-$seed" seed="$seed" optim.matrix.lr="$lr"
    done
    for lr in 0.001 0.002 0.004 0.008; do # one learning rate for all parameters, and the warm-up that AdamW needs
        train "adamw-$lr-$seed" seed="$seed" optim.matrix.optimizer=adamw optim.matrix.lr="$lr" optim.adamw.lr=null \
            schedule.warmup_steps=40
    done
done
"$python" -m scripts.report logs/quickstart_table --out logs/quickstart_table/report --title "quickstart: 1.1 M parameters, 1.6 M tokens"
