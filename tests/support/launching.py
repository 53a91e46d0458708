"""A training on the tiny model as a user starts it: its environment, and its flags."""

import os


ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "LOCAL_RANK"))},
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENVIRONMENT.pop("PYTHONWARNINGS", None)
SETTINGS = [
    "--use_cpu", "--bf16=False", "--max_steps=2", "--max_new_tokens=4", "--lmbda=1", "--report_to=none",
    "--per_device_train_batch_size=2", "--save_strategy=no", "--assistant_alpha=-3.0",
]  # fmt: skip
