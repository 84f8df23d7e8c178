#!/usr/bin/env bash
# On a machine with a GPU: the tests of the kernels, then errors, times and memory of attention, training and decoding.
#   bash scripts/gpu_check.sh [FOLDER]
# Uses the Python and PyTorch that are there. What else is missing is installed from the wheels in WHEELS, a folder, or
# by pip as usual. With MODEL, a converted checkpoint, its own queries and keys are measured as well.
# Results go to FOLDER (default: runs/gpu-check, new): what the tests said, and a folder for each benchmark. A test that
# fails does not stop the benchmarks, but the exit status tells.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-runs/gpu-check}
python=${PYTHON:-python3}
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-deps --no-index --find-links "$WHEELS" "$WHEELS"/*.whl
    "$python" -m pip install --quiet --no-deps --no-build-isolation --editable .
elif ! "$python" -c "import hf_alibi" 2>/dev/null; then
    "$python" -m pip install --quiet --editable '.[dev]'
fi
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU that PyTorch can use"; import triton
print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)'
mkdir -p "$folder"
failed=0
timeout "${TEST_SECONDS:-150}" "$python" -m pytest -q -p no:cacheprovider --override-ini addopts= \
    --import-mode=importlib -k kernels tests/attention/sdpa/test_kernels.py tests/attention/test_backends.py \
    tests/attention/test_sink_tokens.py tests/attention/test_keys_ahead.py 2>&1 | tee "$folder/tests.txt" || failed=$?
benchmark() {
    local name=$1
    shift
    "$python" -m hf_alibi benchmark configs/benchmark/gpu.yaml --output_dir "$folder/$name" "$@" || failed=$?
}
benchmark attention --parts errors attention memory
benchmark decode --parts decode --batch_size 4
if [[ -n ${MODEL:-} ]]; then
    benchmark activations --parts activations --model_name_or_path "$MODEL" --activation_lengths 8192 32768
fi
benchmark models --parts model
exit "$failed"
