#!/bin/sh
# Makes deploy/.env, which docker-compose.yml reads: secrets at random, once. `env.sh cpu` is for machines without a GPU.
set -eu
cd "$(dirname "$0")/.."

case ${1:-gpu} in
  gpu) model=official ;;
  cpu) model=demo ;;
  *) echo "usage: env.sh [gpu|cpu]" >&2; exit 2 ;;
esac
if [ -e .env ]; then
  echo "deploy/.env is there already and stays as it is" >&2
  exit 0
fi

# It begins with a letter: nats-server would take a word of digits for a number.
secret() { printf p; od -An -N20 -tx1 /dev/urandom | tr -d ' \n'; echo; }

umask 077
{
  echo "COMPOSE_PROFILES=${1:-gpu}"
  echo "HEARTMULA_MODEL_PATH=ckpt/$model"
  for role in OPERATOR BOOTSTRAP GATEWAY TOKENIZER CODEC CLIENT; do echo "NATS_${role}_PASSWORD=$(secret)"; done
  echo "S3_ROOT_PASSWORD=$(secret)"
  echo "S3_SERVICE_PASSWORD=$(secret)"
  echo "S3_READER_PASSWORD=$(secret)"
  echo "HEARTMULA_WEBHOOK_SECRET=whsec_$(head -c 32 /dev/urandom | base64 | tr -d '\n')"
} > .env.new
mv .env.new .env
echo "deploy/.env is made; keep a copy of it with your backups"
