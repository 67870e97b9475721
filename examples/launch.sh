# Sourced by the example scripts: `launch key=value ...` becomes the trainer, or starts torchrun with it. Nothing here is about a model.
#
#   NPROC_PER_NODE                                  processes on this machine (default: its GPUs, or one)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT     for several machines: the same command on each, with its own NODE_RANK
#   PYTHON                                          another Python than the active one, the checkout's .venv, or python3
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$checkout${PYTHONPATH:+:$PYTHONPATH}"

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $checkout/.venv/bin/python ]]; then
    PYTHON=$checkout/.venv/bin/python
  fi
fi

launch() {
  local argument
  for argument in "$@"; do
    case $argument in
      # These only print: one process is enough, and no paths are needed.
      -h | --help | --print-config | --dry-run) exec "$PYTHON" -m llava_mcore.train "$@" ;;
    esac
  done
  "$PYTHON" "$checkout/examples/check_paths.py" "$@"
  if [[ -n ${RANK:-} ]]; then  # inside torchrun: this process is a rank already
    exec "$PYTHON" -u -m llava_mcore.train "$@"
  fi

  local processes=${NPROC_PER_NODE:-} where=(--standalone)
  if [[ -z $processes ]]; then
    processes=$("$PYTHON" -c "import torch; print(max(1, torch.cuda.device_count()))")
  fi
  if ((${NNODES:-1} > 1)); then
    : "${NODE_RANK:?set NODE_RANK to the number of this machine, from 0 to NNODES-1}"
    : "${MASTER_ADDR:?set MASTER_ADDR to the address of machine 0}"
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
  fi
  exec "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc-per-node "$processes" -m llava_mcore.train "$@"
}
