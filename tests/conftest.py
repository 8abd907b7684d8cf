"""Fixtures shared by all tests."""

import torch

# One thread: the suite shares its machine, and threads that wait for each other crawl there.
torch.set_num_threads(1)
