#!/bin/sh
# Some tests talk to a real mosquitto. Install it where we may; elsewhere those tests are skipped.
set -u
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && apt-get install -y -qq --no-install-recommends mosquitto >/dev/null && exit 0
fi
echo "mosquitto is not installed: the tests that need it are skipped (apt install mosquitto)" >&2
