#!/usr/bin/env bash
# The whole path in a few minutes on two cores, with nothing downloaded but packages:
#   bash scripts/demo.sh
# pretrains a small GPT-2 with learned positions, converts it to ALiBi, fine-tunes the conversion and two controls on
# 256 tokens (unconverted; without any positions), and compares them at up to 4096 tokens.
#   bash scripts/demo.sh --model PATH [--steps N]
# does the same from a pretrained checkpoint, GPT-2 or LLaMA-style.
#   --output_dir DIR   where the results go (default runs/demo)
set -euo pipefail

usage() {
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
model='' steps='' output_dir=runs/demo
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || usage
    case $1 in
        --model) model=$(realpath -m "$2") ;;
        --steps) steps=$2 ;;
        --output_dir) output_dir=$(realpath -m "$2") ;;
        *) usage ;;
    esac
    shift 2
done
if [ -n "$model" ] && [ ! -e "$model/config.json" ]; then
    echo "error: --model $model has no config.json; give a folder written by save_pretrained" >&2
    exit 1
fi
. "$(dirname "$0")/environment.sh"
if [ -e "$output_dir" ]; then
    echo "error: $output_dir holds an earlier demo; move it away or give another --output_dir" >&2
    exit 1
fi

finetune=() extrapolate=()
if [ -n "$model" ]; then
    # A real model takes seconds a step on a CPU: fewer steps, and fewer tokens scored.
    finetune=(--max_steps "${steps:-20}" --warmup_steps 5 --per_device_train_batch_size 4 --learning_rate 5e-4)
    finetune+=(--eval_strategy no)
    extrapolate=(--scored_tokens 4096)
else
    model=$output_dir/pretrained
    echo "== 1. Pretraining with learned positions"
    hf-alibi finetune configs/finetune/demo-pretrain.yaml --output_dir "$model"
    [ -z "$steps" ] || finetune=(--max_steps "$steps")
fi
for attention in alibi original nope; do
    echo "== 2. Fine-tuning on 256 tokens: $attention"
    hf-alibi finetune configs/finetune/demo.yaml --model_name_or_path "$model" --attention "$attention" \
        --output_dir "$output_dir/$attention" ${finetune[@]+"${finetune[@]}"}
done
echo "== 3. Comparing at 1 to 16 times the training length"
models=$(printf '{"alibi": "%s/alibi", "original": "%s/original", "nope": "%s/nope"}' \
    "$output_dir" "$output_dir" "$output_dir")
hf-alibi extrapolate configs/extrapolate/demo.yaml --models "$models" --output_dir "$output_dir/extrapolation" \
    ${extrapolate[@]+"${extrapolate[@]}"}
