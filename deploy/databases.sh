#!/bin/sh
# Creates the two databases, each owned by a role that reaches no other one. The postgres image runs this once, when its
# volume is empty.
set -eu

create() {  # name of role and database, file with its password
  password_file=$2 psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 --set name="$1" --username "${POSTGRES_USER:-postgres}" \
    --dbname postgres <<'SQL'
\set password `cat "$password_file"`
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name" TEMPLATE template0 ENCODING 'UTF8';
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
}

create label_studio "$LABEL_STUDIO_DATABASE_PASSWORD_FILE"
create prefect "$PREFECT_DATABASE_PASSWORD_FILE"
