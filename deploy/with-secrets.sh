#!/bin/sh
# Runs a command with NAME set to the content of the file for each NAME_FILE=…/secrets/… of the environment, for images
# that read passwords from their environment alone.
set -eu

for name in $(env | sed -n 's|^\([A-Z][A-Z0-9_]*\)_FILE=.*/secrets/.*|\1|p'); do
  eval "file=\$${name}_FILE"
  value=$(cat "$file")
  [ -n "$value" ] || { echo "$file is empty" >&2; exit 1; }
  export "$name=$value"
  unset "${name}_FILE"
done
exec "$@"
