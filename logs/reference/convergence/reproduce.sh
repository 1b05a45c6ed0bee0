#!/usr/bin/env bash
# The tables and figures of this folder: gradients of GPT-2 small's fourth block on 1,024 tokens of the bundled text after 20
# steps, and the study of them. The gradients took ten minutes, the study some ten, on two virtual cores shared with others.
set -euo pipefail
cd "$(dirname "$0")/../../.."
export OMP_NUM_THREADS=1
source scripts/environment.sh
environment requirements.txt requirements-extra.txt
"$python" -m data.prepare sample --tokenizer gpt2-2048 --out data/tokens/sotu-gpt2-2048

run=logs/convergence/run
"$python" train_gpt2.py --config configs/quickstart.yaml run_dir="$run" \
    model.preset=small model.layers=null model.heads=null model.width=null optim.matrix.lr=0.01 optim.adamw.lr=0.001 \
    train.steps=21 train.batch_tokens=1024 train.micro_batch=4 train.eval_every=1000 train.inspect_every=0 \
    data.val_tokens=512 sample.tokens=0 "train.save_gradients_at=[20]"
"$python" -m scripts.convergence --gradients "$run/gradients/step_000020.safetensors" --out logs/reference/convergence
