#!/usr/bin/env bash
# Prefect server and worker on one machine, as plain processes, until Ctrl-C: `make server`. deploy/RUNBOOK.md.
#
#   PORT=4200            port of server and page
#   HOST=127.0.0.1       address; there is no login, so another one opens the server to everybody who reaches it
#   DATABASE_URL=        empty: SQLite; postgresql+asyncpg://USER:PASSWORD@HOST:5432/NAME: PostgreSQL
#   ONTOGENY_ROOT=       store of the runs, default ontogeny-data
#   RUNS=1               runs at the same time
#   GPUS=1, DOWNLOADS=2  checkpoints on GPUs, and runs that download, at the same time
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON_BIN:-.venv/bin/python}
host=${HOST:-127.0.0.1}
port=${PORT:-4200}
export ONTOGENY_ROOT=${ONTOGENY_ROOT:-ontogeny-data}
export ONTOGENY_GPU_LIMIT=${ONTOGENY_GPU_LIMIT:-ontogeny-gpu}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export PREFECT_HOME=${PREFECT_HOME:-$PWD/ontogeny-data/prefect}
export PREFECT_API_URL=http://$host:$port/api
export PREFECT_SERVER_UI_API_URL=/api
export PREFECT_SERVER_ANALYTICS_ENABLED=false
export PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30
export PREFECT_WORKER_QUERY_SECONDS=${PREFECT_WORKER_QUERY_SECONDS:-5}
if [ -n "${DATABASE_URL:-}" ]; then
  export PREFECT_SERVER_DATABASE_CONNECTION_URL=$DATABASE_URL
else
  # Marking many waiting runs as late at once locks SQLite for minutes: they stay "Scheduled".
  export PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED=${PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED:-false}
fi
mkdir -p "$PREFECT_HOME"

server= worker=
stop() {
  trap - EXIT INT TERM
  # The worker first: it tells the server what becomes of its runs.
  for process in $worker $server; do
    kill "$process" 2>/dev/null || continue
    for _ in $(seq 60); do kill -0 "$process" 2>/dev/null || break; sleep 0.5; done
    kill -9 "$process" 2>/dev/null || true
    wait "$process" 2>/dev/null || true
  done
}
trap stop EXIT
trap 'exit 0' INT TERM

"$python" -m prefect server start --host "$host" --port "$port" >"$PREFECT_HOME/server.log" 2>&1 &
server=$!
healthy() { "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=2)' "$PREFECT_API_URL/health" 2>/dev/null; }
until healthy; do
  kill -0 "$server" 2>/dev/null || { tail -n 20 "$PREFECT_HOME/server.log" >&2; exit 1; }
  sleep 0.5
done
"$python" -m flows.cli bootstrap --gpus "${GPUS:-1}" --downloads "${DOWNLOADS:-2}" --silence 90
"$python" -m prefect --no-prompt deploy --all --prefect-file deploy/prefect.yaml >"$PREFECT_HOME/deploy.log" 2>&1 ||
  { tail -n 20 "$PREFECT_HOME/deploy.log" >&2; exit 1; }
echo "Prefect's page: http://$host:$port - Ctrl-C stops server and worker; logs are in $PREFECT_HOME"
# Prefect's worker stops by an interrupt to itself, which what a script starts with & ignores. It has a process
# group of its own, because a second interrupt, that of Ctrl-C, would kill it before it has told the server.
interruptible='import os, signal, sys
os.setpgid(0, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
while kill -0 "$server" 2>/dev/null; do # a worker that dies is started again
  "$python" -c "$interruptible" -m prefect worker start --pool ontogeny --type process --limit "${RUNS:-1}" >>"$PREFECT_HOME/worker.log" 2>&1 &
  worker=$!
  wait "$worker" || true
  sleep 1
done
tail -n 20 "$PREFECT_HOME/server.log" >&2
exit 1
