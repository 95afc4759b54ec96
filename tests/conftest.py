"""What all tests share."""

import os

# One thread, so that two workers do not wait for each other's; the processes that tests start get it too, since many
# results are compared bit for bit and the order of a sum depends on it. Set before anything imports torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
