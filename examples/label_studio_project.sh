#!/usr/bin/env bash
# A finished run to a Label Studio project: what was found stands on the pictures, to be accepted or mended.
#   examples/label_studio_project.sh [RUN [FOLDER [OPTION...]]] # a server of its own, which stays; OPTIONs of export
#   LABEL_STUDIO_URL=http://localhost:8080 LABEL_STUDIO_API_KEY=… examples/label_studio_project.sh RUN # in yours
set -euo pipefail
here=$(dirname "$0")
run=${1:-} out=${2:-label-studio}
mkdir -p "$out"

if [ -z "$run" ]; then
  run=$out/run
  md3 run "$here/scenes" --task detect:red\ circle,star --task caption:short --model tiny -o "$run"
fi
notes=$(md3 export "$run" --format labelstudio -o "$out/project" --overwrite "${@:3}" 2>&1) || { echo "$notes" >&2; exit 1; }
echo "$notes" >&2
root=$(sed -n 's/.*LOCAL_FILES_DOCUMENT_ROOT=//p' <<<"$notes")
folders=$(sed -n 's/.*storage with the path \(.*\) (no sync needed).*/\1/p' <<<"$notes")
[ -n "$root" ] || exit 1 # the notes say what to add

server=$out/server
if [ -n "${LABEL_STUDIO_URL:-}" ]; then # it must have been started with the two settings that the notes name
  url=${LABEL_STUDIO_URL%/} token=${LABEL_STUDIO_API_KEY:?}
else
  command -v label-studio >/dev/null || { echo "this example needs Label Studio: pip install label-studio" >&2; exit 1; }
  mkdir -p "$server"
  [ -s "$server/token" ] || (umask 077 && od -An -tx1 -N20 /dev/urandom | tr -d ' \n' >"$server/token")
  token=$(<"$server/token")
  if ! curl -fs -o /dev/null "$(cat "$server/url" 2>/dev/null)/health"; then # else an earlier start left it running
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    echo "http://127.0.0.1:$port" >"$server/url"
    LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT=$root \
      LABEL_STUDIO_BASE_DATA_DIR=$(cd "$server" && pwd) COLLECT_ANALYTICS=false LATEST_VERSION_CHECK=false \
      DATA_UPLOAD_MAX_MEMORY_SIZE=4000000000 \
      nohup label-studio start --no-browser --internal-host 127.0.0.1 --port "$port" --username me@example.org \
      --password "$token" --user-token "$token" --enable-legacy-api-token >"$server/log" 2>&1 </dev/null &
    echo $! >"$server/pid"
  fi
  url=$(<"$server/url")
  until curl -fs -o /dev/null "$url/health"; do # its first start takes a minute
    kill -0 "$(<"$server/pid")" || { tail "$server/log" >&2; exit 1; }
    sleep 1
  done
fi

authorization="Token $token"
if [[ $token == *.*.* ]]; then # a personal access token, which is good for short-lived ones
  access=$(curl -fsS "$url/api/token/refresh" -H "Content-Type: application/json" -d "{\"refresh\": \"$token\"}")
  authorization="Bearer $(sed 's/.*"access": *"\([^"]*\)".*/\1/' <<<"$access")"
fi
ask() {
  local answer
  answer=$(curl -sS --fail-with-body -H "Authorization: $authorization" "$url/api/$@") || { echo "$answer" >&2; return 1; }
  echo "$answer"
}

name=$(basename "$run") # titles have 3 to 50 characters
made=$(ask projects --form-string title="md3 ${name:0:40}" -F label_config="<$out/project/interface.xml")
project=$(sed 's/^{"id": *\([0-9]*\).*/\1/' <<<"$made")
while IFS= read -r folder; do # one for each run
  ask storages/localfiles -F project="$project" --form-string path="$folder" -F title=pictures -F use_blob_urls=true
done >/dev/null <<<"${folders// and another with the path /$'\n'}"
ask "projects/$project/import" -F "file=@$out/project/tasks.json;type=application/json" >/dev/null

# All of them are right? Select all, then Actions, "Create Annotations From Predictions"; then Export, as JSON.
[ -n "${LABEL_STUDIO_URL:-}" ] ||
  echo "log in as me@example.org with the password $token; stop the server with: kill $(<"$server/pid")"
echo "$url/projects/$project/data"
