#!/usr/bin/env bash
# Run once, when the autograder's image is built.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

export DEBIAN_FRONTEND=noninteractive
apt-get update -q
apt-get install -y -q --no-install-recommends bubblewrap util-linux python3 python3-venv
python3 -m venv "$here/.venv"
"$here/.venv/bin/python" -m pip install -q -c "$here/constraints.txt" "$here"
chmod -R go-rwx "$here/hidden" # where there is no sandbox, a submission runs as another user
