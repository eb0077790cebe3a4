"""The command line in a process of its own, without the seconds that importing torch and transformers takes.

The process is forked from one that has imported them. Tests of the start itself, of signals, or of variables that a
library reads when it is imported start a new interpreter instead.
"""

import io
import os
import signal
import subprocess
import sys
import tempfile
import traceback


def run_command(*args, cwd, env=None, timeout=300, before=None):
    """A subprocess.CompletedProcess with text, as `kbne-edit ARGS` in the folder `cwd` would give it.

    before: called in the child before anything else.
    """
    import transformers  # noqa: F401  the children inherit it

    args = list(map(str, args))
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            _child(args, cwd, env, out.fileno(), err.fileno(), timeout, before)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [_text(file) for file in (out, err)]
    if status == -signal.SIGALRM:
        raise subprocess.TimeoutExpired(args, timeout, *texts)
    return subprocess.CompletedProcess(args, status, *texts)


def _text(file):
    file.seek(0)
    return io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace").read()


def _child(args, cwd, env, out, err, timeout, before):
    status = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(timeout)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin = open(0, closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", errors="strict", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        if before is not None:
            before()
        os.chdir(cwd)
        os.environ.update({"TOKENIZERS_PARALLELISM": "false"} | (env or {}))  # a fork is no place for its threads
        status = _main(args)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _main(args):
    from kbne_edit.commands import main

    sys.argv = ["kbne-edit", *args]
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
