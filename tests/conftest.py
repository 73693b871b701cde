"What every test relies on."

import os

from hypothesis import settings

# Inherited by the kernels that tests start. Nothing is downloaded, and no bar is drawn.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
    "DR2SEG_WATCHED": "1",
}

settings.register_profile("project", deadline=None)  # a busy machine is no failure
settings.load_profile("project")
