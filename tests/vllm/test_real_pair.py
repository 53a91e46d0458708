"""SmolLM2-135M-Instruct on a real vLLM teaches itself less six layers (`make test-vllm`)."""

import pytest
import torch
from datasets import Dataset
from observe import logged
from server import serving
from transformers import AutoModelForCausalLM
from vllm_server import needs_vllm

from amid_trl import AMiDConfig, AMiDTrainer
from amid_trl.models.pruning import drop_layers


pytestmark = [needs_vllm, pytest.mark.timeout(3000)]
TOP_K = 100


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """Where the teacher lies, its tokenizer, and rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath / "examples")
        import embedded
    folder = tmp_path_factory.mktemp("pair")
    _, tokenizer = embedded.load_teacher(folder)
    rows = Dataset.from_list(embedded.questions().train[100:108])
    return str(folder / "SmolLM2-135M-Instruct"), tokenizer, rows


def trained(pair, folder, teacher=None, **settings) -> AMiDTrainer:
    """Two steps of four rows."""
    place, tokenizer, rows = pair
    trainer = AMiDTrainer(
        drop_layers(AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), range(16, 22)),
        teacher,
        AMiDConfig(
            **{"output_dir": str(folder), "use_cpu": True, "bf16": False, "max_steps": 2, "logging_steps": 1},
            **{"per_device_train_batch_size": 4, "learning_rate": 1e-4, "optim": "sgd", "max_length": 128},
            **{"report_to": [], "save_strategy": "no", "disable_tqdm": True, "lmbda": 0.0, "objective": "kd"},
            **settings,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def test_the_real_pair_trains(vllm, pair, tmp_path, caplog):
    """In float32 the losses are those of the exact k likeliest tokens; vLLM's default, bfloat16, is warned of."""
    teacher = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32).eval()
    memory = logged(trained(pair, tmp_path / "memory", teacher), "kl")
    with serving(teacher, max_logprobs=TOP_K) as stand_in:
        url = {"teacher_model_server_url": stand_in.url}
        want = logged(trained(pair, tmp_path / "stand-in", teacher_top_k=TOP_K, **url), "kl")
    caplog.clear()
    bounds = ("--max-logprobs", str(TOP_K), "--max-model-len", "256")
    served = {}
    for dtype in ("float32", None):
        said = () if dtype is None else ("--dtype", dtype)
        settings = {"teacher_model_server_url": vllm.serve(pair[0], *bounds, *said), "teacher_top_k": TOP_K}
        served[dtype] = logged(trained(pair, tmp_path / str(dtype), **settings), "kl")
        warned = "depends on the rows beside it" in caplog.text
        assert warned == (dtype is None), caplog.text
    print(f"KL of two steps: memory {memory}, exact lists {want}, vLLM {served}")
    assert served["float32"] == pytest.approx(want, rel=1e-4)
    assert all(0 < bound < kl for bound, kl in zip(served["float32"], memory, strict=True))
    assert served[None] == pytest.approx(want, rel=0.05)
