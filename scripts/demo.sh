#!/usr/bin/env bash
# The whole path in a few minutes on two cores, with nothing downloaded but packages:
#   bash scripts/demo.sh
# pretrains a small LLaMA-style model on 256 tokens, converts it to ALiBi by the recipe, trains the original on as many
# tokens, compares both at up to 4096 tokens, and lets both continue a text longer than the original can read.
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

convert=()
if [ -n "$model" ]; then
    # A real model takes seconds a step on a CPU: fewer steps, no distillation, fewer tokens scored.
    convert=(--max_steps "${steps:-20}" --warmup_steps 5 --per_device_train_batch_size 4 --learning_rate 5e-4)
    convert+=(--control_learning_rate 2e-4 --match_tokens 2048 --distill_tokens 0 --scored_tokens 4096 --baselines null)
else
    model=$output_dir/pretrained
    echo "== 1. Pretraining with rotary positions on 256 tokens"
    hf-alibi finetune configs/finetune/demo.yaml --output_dir "$model"
    [ -z "$steps" ] || convert=(--max_steps "$steps")
fi
echo "== 2. Converting to ALiBi, training the original on as many tokens, comparing at 1 to 16 times the length"
hf-alibi convert configs/convert/demo.yaml --model_name_or_path "$model" --output_dir "$output_dir/alibi" \
    ${convert[@]+"${convert[@]}"}
echo "== 3. The same text continued by both"
python scripts/continue_text.py "$output_dir/alibi" "$output_dir/alibi/control"
