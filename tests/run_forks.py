"""Runs commands of prunet, each in a fork of one process that has imported everything, so that it starts at once.

Reads `[arguments, file for its output]` as JSON, one a line; answers with the process's number, then with its exit code
(negative: the signal that killed it).
"""

import json
import os
import sys

import torch

from prunet import cli
from prunet.data import encoding as latents


def main() -> None:
    torch.set_num_threads(1)
    latents.BLOCK = 2
    for line in sys.stdin:
        arguments, log = json.loads(line)
        if not (child := os.fork()):
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = ["prunet", *arguments]
            code = 1
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
