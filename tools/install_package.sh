#!/bin/sh
# Some tests talk to a real server. Install its package where we may; elsewhere they are skipped.
set -u
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "$1" >/dev/null && exit 0
fi
echo "$1 is not installed: the tests that need it are skipped (apt install $1)" >&2
