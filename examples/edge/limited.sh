#!/bin/sh
# Runs draw.py as on a small device: on two cores, with 2 GB of address space.
#
#     examples/edge/limited.sh runs/demo/openvino-int8 "a noto emoji of red heart" picture.png
#
# PYTHON is the interpreter, python by default.
export MALLOC_ARENA_MAX=2  # glibc would reserve 64 MB of addresses for each thread
ulimit -v 2000000
exec taskset -c 0,1 "${PYTHON:-python}" "$(dirname "$0")/draw.py" "$@"
