"""What every test shares: one thread in each process, as many of them run beside others on few cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; a run takes it for what was asked for
