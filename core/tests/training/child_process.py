"""A piece of work in a process of its own, for tests that end one."""

import os


def in_child(act):
    """The exit status of `act` in a forked process; its exceptions are 99."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = act() or 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
