#!/usr/bin/env bash
# Two commands on one GPU, each bounded to a percentage of its SMs by a control daemon of their own (docs/mps.md).
#
#   bash scripts/mps_pair.sh PERCENT COMMAND PERCENT COMMAND
#
# Exit status 0 if both commands end with 0; 2 if the words are wrong or there is no MPS here.
set -u
if [ "$#" -ne 4 ]; then
    echo "usage: mps_pair.sh PERCENT COMMAND PERCENT COMMAND" >&2
    exit 2
fi
for percent in "$1" "$3"; do
    case "$percent" in
    '' | *[!0-9]* | 0 | ????*)
        echo "mps_pair: $percent is no percentage from 1 to 100" >&2
        exit 2
        ;;
    esac
    [ "$percent" -le 100 ] || {
        echo "mps_pair: $percent is no percentage from 1 to 100" >&2
        exit 2
    }
done
command -v nvidia-cuda-mps-control >/dev/null || {
    echo "mps_pair: nvidia-cuda-mps-control is not here: it comes with NVIDIA's driver" >&2
    exit 2
}

directory=$(mktemp -d)
export CUDA_MPS_PIPE_DIRECTORY="$directory/pipe" CUDA_MPS_LOG_DIRECTORY="$directory/log"
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
stop() {
    echo quit | nvidia-cuda-mps-control
    rm -rf "$directory"
}
nvidia-cuda-mps-control -d || exit 2
trap stop EXIT

CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$1 bash -c "$2" &
first=$!
CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=$3 bash -c "$4" &
second=$!
code=0
wait "$first" || code=1
wait "$second" || code=1
exit "$code"
