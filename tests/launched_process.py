"""What the tests of launching launch: ``python -m tests.launched_process NAME…`` ends as the first NAME that fits says.

Names are ``RANK:ENDING`` with an ending of ``status2``, ``SIGKILL``, or ``interrupt`` or ``terminate`` (the launcher);
a process that no name is for waits until the launcher ends it, and without names every process ends with status 0.
"""

import os
import signal
import sys
import time

if __name__ == "__main__":
    rank = os.environ["RANK"]
    endings = dict(name.split(":") for name in sys.argv[1:])
    ending = endings.get(rank, "wait" if endings else "status0")
    if ending in ("interrupt", "terminate"):
        os.kill(os.getppid(), signal.SIGINT if ending == "interrupt" else signal.SIGTERM)
    elif ending.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[ending])
    elif ending.startswith("status"):
        sys.exit(int(ending.removeprefix("status")))
    time.sleep(100)
