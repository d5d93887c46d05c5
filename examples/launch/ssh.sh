#!/bin/bash
# A run on machines that ssh reaches: ssh.sh RECIPE OUT HOST...
#
# The recipe, OUT, and the program ($MATTOCK) must be in the same place on all hosts: a shared file system. The first host
# has the coordinator; on another, whatever ends is started again until the run is done. Ctrl-C stops the run with a
# checkpoint; the same command goes on from there. ssh options: $SSH, such as SSH="ssh -F my_config".
set -u
RECIPE=$(realpath "${1:?RECIPE}") OUT=$(realpath -m "${2:?OUT}"); shift 2
[ $# -gt 0 ] || { echo "no HOST" >&2; exit 2; }
MATTOCK=$(realpath "${MATTOCK:-target/release/mattock}") hosts=("$@")
pids=() stopping=

# One host until the run is over. With -tt what runs there ends with the connection.
node() {
  local rank=$1 host=$2 status
  while true; do
    ${SSH:-ssh} -tt -o ServerAliveInterval=5 "$host" "$MATTOCK" train "$RECIPE" --out "$OUT" --resume-if-any \
      --workers "${WORKERS:-2}" --nodes ${#hosts[@]} --node-rank "$rank" ${LISTEN:+--listen "$LISTEN"} </dev/null
    status=$?
    # 0: done; 2: the input is at fault; 130: told to stop. The first host is not started again for a failed run.
    case $status in 0 | 2 | 130) return $status ;; esac
    [ "$rank" != 0 ] && kill -0 "$first" 2>/dev/null || return $status
    sleep 2
  done
}

first=$$
for rank in "${!hosts[@]}"; do
  # In groups of their own, so that Ctrl-C here reaches this script alone.
  set -m; node "$rank" "${hosts[$rank]}" & pids+=($!); set +m
  [ "$rank" = 0 ] && first=$!
done
stop() {
  stopping=1
  ${SSH:-ssh} "${hosts[0]}" pkill -TERM -f "'^$MATTOCK train $RECIPE --out $OUT .*--node-rank 0'"
}
trap stop INT TERM
wait "$first"; status=$?
while [ -n "$stopping" ] && kill -0 "$first" 2>/dev/null; do wait "$first"; status=$?; done
for pid in "${pids[@]:1}"; do wait "$pid"; done
exit "$status"
