"""What holds for all tests."""

import torch
from hypothesis import settings

# One thread: the suite shares its machine, and threads that wait for each other crawl there.
torch.set_num_threads(1)
# No example fails because others were at work.
settings.register_profile("aprium", deadline=None)
settings.load_profile("aprium")
