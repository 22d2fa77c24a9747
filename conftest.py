"""What every test run needs, notebooks included: the kernels that nbval starts inherit this environment."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # stored outputs hold no progress bars: they are built without
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
