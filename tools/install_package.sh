#!/bin/sh
# Some tests need real programs. Install their packages where we may; elsewhere they are skipped.
set -u
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends "$@" >/dev/null && exit 0
fi
echo "$* not installed: the tests that need it are skipped (apt install $*)" >&2
