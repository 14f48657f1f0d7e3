# The ablation on a bare machine with a GPU, many runs at a time: how the lines of ablation.jsonl were made.
#
#   OUT=FOLDER DATA=FOLDER bash benchmarks/ablation_device.sh SECONDS [arguments of `ablation.py run`]
#
# DATA holds CIFAR-10's parquet files. Wheels of what the machine lacks lie in .whl (fvcore, iopath, yacs, termcolor,
# timm, ltm_retrofit; `pip wheel --no-deps -w .whl NAME`). It stops after SECONDS; log and base then lie in OUT. Trains
# the base where benchmarks/ has none. CUDA's MPS lets the processes share the GPU kernel by kernel, where it is there.
set -u
began=$(date +%s)
limit=$1
shift
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/site .whl/*.whl || exit 1
export PYTHONPATH=/tmp/site PATH=$PATH:/usr/local/nvidia/bin
if command -v nvidia-cuda-mps-control; then
  export CUDA_MPS_PIPE_DIRECTORY=/tmp/mps CUDA_MPS_LOG_DIRECTORY=/tmp/mps_log
  mkdir -p $CUDA_MPS_PIPE_DIRECTORY $CUDA_MPS_LOG_DIRECTORY
  nvidia-cuda-mps-control -d
  if ! timeout 60 python3 -c "import torch; torch.ones(3, device='cuda').sum().item()"; then
    echo quit | nvidia-cuda-mps-control
    unset CUDA_MPS_PIPE_DIRECTORY
  fi
fi
data=$(realpath "$DATA")
cd benchmarks || exit 1
[ -f ablation_base.safetensors ] || python3 ablation_base.py --data "$data"
cp ablation_base.safetensors ablation_base.jsonl "$OUT"
[ -f ablation.jsonl ] && cp ablation.jsonl "$OUT"
timeout -k 3 $((limit - $(date +%s) + began)) \
  python3 ablation.py run --data "$data" --workers "${WORKERS:-12}" --log "$OUT/ablation.jsonl" "$@"
