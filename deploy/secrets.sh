#!/bin/sh
# Makes the passwords of compose.yaml that are missing in the folder `secrets` beside this script; changes none.
# The folder keeps other users of the machine out. The files are readable by all, since each container has a user of its
# own, and Compose mounts the files of its secrets with the permissions that they have.
set -eu
cd "$(dirname "$0")"

umask 077
mkdir -p secrets
chmod 700 secrets

make() {  # name of the file, what stands before the random part
  [ -s "secrets/$1" ] && return
  printf '%s%s\n' "${2:-}" "$(od -An -N20 -tx1 /dev/urandom | tr -d ' \n')" >"secrets/$1.new"
  chmod 444 "secrets/$1.new"
  mv "secrets/$1.new" "secrets/$1"
}

for name in postgres label_studio_database label_studio_key label_studio_password label_studio_token prefect_database store; do
  make "$name"
done
make prefect_login al:
