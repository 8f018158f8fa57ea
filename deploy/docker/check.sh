#!/bin/sh
# What the Dockerfile's stages install, in empty virtual environments on this machine: a missing file or package shows.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/context"
sed -n 's/^!//p' .dockerignore | while read -r name; do cp -R "$name" "$work/context/"; done

stage() { # name, modules that its processes run
  echo "== $1"
  python3 -m venv "$work/$1"
  cd "$work/context"
  [ "$1" = gateway ] || "$work/$1/bin/pip" install --quiet "torch==${TORCH:-2.13.0}"
  "$work/$1/bin/pip" install --quiet --constraint constraints.txt "$2"
  cd "$work"  # away from the source
  shift 2
  for module in "$@"; do "$here/bin/python" -c "import $module" && echo "$module"; done
}

here=$work/gateway
stage gateway . services.gateway.server deploy.setup deploy.store_setup services.client.cli
test -z "$("$here/bin/pip" list 2>/dev/null | grep -i '^torch ')"
test -f "$("$here/bin/python" -c 'import deploy, pathlib; print(pathlib.Path(deploy.__path__[0]) / "nats" / "roles.conf")')"
here=$work/worker
stage worker '.[worker]' services.tokenizer_worker.stage services.codec_worker.stage
du -sm "$work/gateway" "$work/worker" | sed "s|$work/||"
