#!/bin/bash
# All devices of one machine, one worker for each; started again as it is, it goes on: one-machine.sh RECIPE OUT
exec "${MATTOCK:-mattock}" train "${1:?RECIPE}" --out "${2:?OUT}" --resume-if-any \
  --device cuda --workers "${WORKERS:-$(nvidia-smi --list-gpus | wc -l)}"
