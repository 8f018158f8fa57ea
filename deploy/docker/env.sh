#!/bin/sh
# Write deploy/.env with random secrets, once, for docker-compose.yml. `env.sh cpu` is for machines without a GPU.
set -eu
cd "$(dirname "$0")/.."

case ${1:-gpu} in
  gpu) model=official ;;
  cpu) model=demo ;;
  *) echo "usage: env.sh [gpu|cpu]" >&2; exit 2 ;;
esac
if [ -e .env ]; then
  echo "deploy/.env exists already and is left unchanged" >&2
  exit 0
fi

# A secret begins with a letter, because nats-server reads a word of digits as a number.
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
echo "deploy/.env is written; keep a copy of it with your backups"
