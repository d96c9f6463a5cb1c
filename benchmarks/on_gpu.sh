#!/bin/bash
# What needs an NVIDIA GPU, in one go of seven minutes on an H100: the tests, then latency of a LLaVA of 7 billion random weights.
# Every piece has a time limit of its own and writes as it goes: one that fails or is stopped loses nothing of the others.
#
#     benchmarks/on_gpu.sh out/gpu
out=${1:?the folder for what is found}
cd "$(dirname "$0")/.." && mkdir -p "$out" || exit
export PYTHONPATH="$PYTHONPATH:$PWD" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
failed=0

piece() { # name, seconds, command...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
    local code=$?
    echo "$name: exit $code, $((SECONDS - begin)) s"
    tail -n "${LINES_SHOWN:-12}" "$out/$name.log" | cut -c 1-400
    ((code == 0)) || failed=1
}

latency() { # name, seconds, image tokens, batches, rounds
    piece "$1" "$2" python3 benchmarks/vlm_latency.py --size 7b --device cuda --dtype bfloat16 --images "$3" --batches "$4" \
        --rounds "$5" --methods dense,vitcop-64,vitcop-192,divprune-64,pyramiddrop-64 --output "$out/vlm_latency_gpu"
}

python3 -c "import torch, transformers; print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())"
piece tests 130 python3 -m pytest -q -m gpu -p no:cacheprovider tests/test_vlm_gpu.py tests/test_vlm_bench.py tests/test_runtime.py \
    tests/test_larger_than_a_gpu.py tests/test_on_gpus.py
latency latency_576 110 576 1,8,32 8
latency latency_2880 90 2880 1,8 4
latency latency_2880_many 80 2880 32 2
cat "$out/vlm_latency_gpu.md"
exit $failed
