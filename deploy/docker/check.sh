#!/bin/sh
# Install in empty virtual environments what the Dockerfile's stages install, to find missing files and packages.
set -eu
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/context" "$work/dependencies/services/client"
sed -n 's/^!//p' .dockerignore | while read -r name; do cp -R "$name" "$work/context/"; done
cp pyproject.toml constraints.txt "$work/dependencies/"
cp services/client/pyproject.toml "$work/dependencies/services/client/"
for folder in . services/client; do touch "$work/dependencies/$folder/README.md" "$work/dependencies/$folder/LICENSE"; done
torch=$(sed -n 's/^ARG TORCH=//p' deploy/docker/Dockerfile)

install() { # environment, folder, arguments of pip
  env=$work/$1 folder=$work/$2
  shift 2
  [ -e "$env" ] || python3 -m venv --without-pip "$env"
  (cd "$folder" && python3 -m pip --python "$env" install --quiet "$@")
}

stage() { # environment, modules that its processes run
  cp -R "$work/code/lib/." "$work/$1/lib/"
  python=$work/$1/bin/python
  shift
  for module in "$@"; do
    (cd "$work" && "$python" -I -c "import $module") # away from the source
    echo "$module"
  done
}

install code context --no-deps ./services/client .

echo "== gateway"
install gateway dependencies --constraint constraints.txt './services/client[cli,mcp]' .
stage gateway services.gateway.server services.gateway.mcp.server deploy.setup deploy.store_setup heartmula_client.cli
if "$python" -I -c 'import torch' 2>/dev/null; then echo "torch is there" >&2; exit 1; fi
test -f "$(cd "$work" && "$python" -I -c 'import deploy; print(*deploy.__path__)')/nats/roles.conf"

echo "== worker"
install worker dependencies "torch==$torch"
install worker dependencies --constraint constraints.txt '.[worker]'
stage worker services.tokenizer_worker.stage services.tokenizer_worker.engines.native \
  services.codec_worker.stage services.codec_worker.engines.native

du -sm "$work/gateway" "$work/worker" "$work/code" | sed "s|$work/||"
