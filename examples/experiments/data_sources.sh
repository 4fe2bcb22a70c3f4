#!/usr/bin/env bash
# Two rounds of supervised training on right answers written by the student (rejection sampling), by the mixture of
# student and teacher, or by the teacher. The second round's answers are written with the student that the first one
# trained.
#
#   bash examples/experiments/data_sources.sh
#   python examples/experiments/data_sources.py outputs/experiments/data_sources
#
# Every source answers the same 640 problems twice in each round, and gets 40 steps of 64 of its right answers. SEEDS: a
# list of other ones. Finished parts are not repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/experiments/common.sh

SEEDS=$SEEDS ROUNDS=2 KINDS=right OUTPUT_DIR=$EXPERIMENTS/data_sources \
   exec bash examples/optimal_sampling/06_compare_sources.sh
