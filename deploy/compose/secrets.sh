#!/bin/sh
# The passwords that compose.yaml hands to its services, made once: what is there stays.
set -eu
cd "$(dirname "$0")"
[ ! -d secrets ] || exit 0
password() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
redis=$(password)
postgres=$(password)
rm -rf secrets.draft
mkdir -m 700 secrets.draft
printf %s "$redis" >secrets.draft/redis_password
printf %s "$postgres" >secrets.draft/postgres_password
printf %s "redis:6379,password=$redis" >secrets.draft/redis
printf %s "postgresql+psycopg://memoir:$postgres@postgres:5432/memoir" >secrets.draft/registry
# Services read them under accounts of their own; whoever is on this machine stops at the folder.
chmod 444 secrets.draft/*
mv secrets.draft secrets
