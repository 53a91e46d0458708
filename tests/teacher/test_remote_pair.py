"""The real pair through `amid-trl serve-teacher`: SmolLM2-135M-Instruct, and itself less six layers."""

import os

import pytest
import torch
from datasets import Dataset
from observe import logged
from real_pair import saved_teacher
from states_server import command, free_port, wire
from transformers import AutoModelForCausalLM

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.models.pruning import drop_layers


pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
VOCABULARY, DIM = 49152, 576


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Where the teacher lies, its tokenizer, and rows."""
    place, tokenizer, rows = saved_teacher(request, tmp_path_factory.mktemp("pair"), 100, 116)
    return place, tokenizer, Dataset.from_list(rows)


def trained(pair, tmp_path, dtype="float32", url=None, **settings) -> AMiDTrainer:
    """Two steps of eight rows."""
    place, tokenizer, rows = pair
    trainer = AMiDTrainer(
        drop_layers(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), range(16, 22)),
        None if url else AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype)),
        AMiDConfig(
            **{"output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "max_steps": 2},
            **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1},
            **{"learning_rate": 1e-4, "optim": "sgd", "max_length": 128, "max_new_tokens": 16, "report_to": []},
            **{"save_strategy": "no", "disable_tqdm": True, "teacher_model_server_url": url, **settings},
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    counted, count = [], trainer._get_num_items_in_batch
    trainer._get_num_items_in_batch = lambda *given: counted.append(int(count(*given))) or count(*given)
    trainer.train()
    trainer.counted = sum(counted)
    return trainer


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
@pytest.mark.parametrize(("dtype", "rel"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_the_loss_is_that_of_the_teacher_in_memory_and_a_token_is_small(pair, tmp_path, dtype, rel, lmbda):
    port = free_port()
    with command(pair[0], "--dtype", dtype, port=port, environment=ENVIRONMENT), wire(port) as line:
        served = trained(pair, tmp_path, url=line.url, lmbda=lmbda, objective="amid")
        sent = line.sent + line.received
    want = trained(pair, tmp_path, dtype, lmbda=lmbda, objective="amid")
    for name in ("loss", "kl", "teacher_entropy", "grad_norm"):
        assert logged(served, name) == pytest.approx(logged(want, name), rel=rel), name
    itemsize = getattr(torch, dtype).itemsize
    head = VOCABULARY * DIM * itemsize
    of_token = (sent - head) / served.counted
    print(f"{of_token:.0f} bytes a trained token in {dtype}, of {served.counted}")
    assert itemsize * DIM < of_token < itemsize * DIM * 1.1
    assert dtype == "float32" or 2 * VOCABULARY / of_token > 75, "of bfloat16 logits"
