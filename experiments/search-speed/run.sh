#!/bin/sh
# About 12 minutes on two CPU threads.
cd "$(dirname "$0")/../.." || exit 1
# Threads wait as PyTorch has them wait by default: engines take turns, so nobody is disturbed.
unset OMP_WAIT_POLICY KMP_BLOCKTIME
OMP_NUM_THREADS=2 PYTHONPATH=. exec "${PYTHON:-python}" experiments/search-speed/run.py "$@"
