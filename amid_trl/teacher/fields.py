"""The fields of AMiDConfig that say which teacher there is, and where it lies."""

from dataclasses import dataclass
from typing import Any, Literal

from amid_trl.fields import (
    JSON,
    Fields,
    check_at_least,
    check_choice,
    check_file,
    check_shares,
    check_weights,
    option,
    without_effect,
)
from amid_trl.teacher.cache_about import holds_states


# What loads a teacher by its name.
LOADING_FIELDS = (
    "teacher_model_init_kwargs",
    "teacher_model_revision",
    "teacher_load_in_8bit",
    "teacher_load_in_4bit",
)
# Each decides by itself where the teacher's weights lie.
PLACES = ("teacher_load_in_8bit", "teacher_load_in_4bit", "teacher_offload", "teacher_deepspeed")
# Those of a teacher that has a model of its own here.
MODEL_FIELDS = (
    "teacher_model_name_or_path",
    "teacher_tokenizer_name_or_path",
    *dict.fromkeys((*LOADING_FIELDS, *PLACES)),
)


@dataclass
class TeacherFields(Fields):
    """Parameters that control the teacher."""

    teachers: JSON = option(
        None,
        "Several teachers by name, each described by the fields of a single one and, where it has an objective of its "
        'own, by those of the objective: {"math": {"teacher_model_name_or_path": "Qwen/Qwen2.5-Math-7B-Instruct"}, '
        '"chat": {"teacher_model_server_url": "http://there:8000"}}. The column teacher names the row\'s; a row that '
        "names none needs a teacher called default.",
    )
    teacher_model_revision: str | None = option(None, "Revision of the teacher on the Hub.")
    teacher_tokenizer_name_or_path: str | None = option(
        None,
        "The teacher's tokenizer, by default the one beside its weights. It may be another one than the student's: "
        "it then reads the text in its own tokens, and both are compared on what they have in common.",
    )
    teacher_adapter_path: str | None = option(
        None,
        "The teacher is the student's base model under this adapter, or 'base', under none. For a student with an "
        "adapter; the base is held in memory once.",
    )
    teacher_ema: float | None = option(
        None,
        "The teacher is the student's moving average, with this decay in [0, 1] for each step: 0.999 follows slowly, "
        "0 is the student of the last step, 1 the student as it began.",
    )
    teacher_load_in_8bit: bool = option(
        False, "Quantise the teacher with bitsandbytes while it is loaded: LLM.int8(). Its head stays as it is."
    )
    teacher_load_in_4bit: bool = option(False, "Likewise, to 4 bits (NF4).")
    teacher_offload: bool = option(
        False,
        "Keep the teacher in the host's memory; its weights are copied to the device for each of its forward passes.",
    )
    teacher_deepspeed: JSON = option(
        None,
        "A DeepSpeed configuration of the teacher's own (or its file): ZeRO-3 for the teacher of a student that is "
        "not sharded, with offload_param if there is no room for it, or the reverse. By default it is sharded if "
        "the student is.",
    )
    teacher_model_server_url: str | None = option(
        None,
        "A server that the teacher runs on, in place of a model in memory: `amid-trl serve-teacher`, whose teacher is "
        "compared exactly, or vLLM (OpenAI-compatible, with prompt_logprobs), of which the teacher_top_k likeliest "
        "tokens are compared, and all others as one.",
    )
    teacher_server_patience: float = option(
        300.0,
        "Seconds that the server may be silent, counted from its last answer, before the run ends: it may be "
        "starting, or be started again.",
    )
    teacher_cache: str | None = option(
        None,
        "A folder of the teacher's answers, written by `amid-trl cache-teacher` with the same settings, in place of a "
        "teacher; with teacher_cache_fill, beside one. For runs on the dataset's text.",
    )
    teacher_cache_fill: bool = option(
        False,
        "Write the teacher's hidden states into teacher_cache while training. What is there is not asked for again: "
        "from the second epoch on the teacher does not run, and of a cache that is whole it is not loaded.",
    )
    teacher_cache_states: bool = option(
        False,
        "`amid-trl cache-teacher` writes the teacher's hidden states and its head, in place of its likeliest tokens: "
        "every objective is exact then, at every temperature.",
    )
    teacher_top_k: int = option(
        100, "How many of the teacher's likeliest tokens vLLM gives, or the cache holds, for each token."
    )
    teacher_cache_dtype: Literal["bfloat16", "float16", "float32"] | None = option(
        None,
        "In what the cache is written: log-probabilities in float16 (the default) or float32; hidden states in "
        "bfloat16, float16 or float32, by default that of the product with the head, which loses nothing.",
    )

    @property
    def reads_cache(self) -> bool:
        """Whether a cache stands for the teacher, and all of its answers are in it."""
        return self.teacher_cache is not None and not self.teacher_cache_fill

    @property
    def absent_teacher(self) -> str | None:
        """What stands for a teacher with a model of its own: a server, a cache, an adapter, or the student."""
        cache = self.teacher_cache if self.reads_cache else None
        average = None if self.teacher_ema is None else f"teacher_ema={self.teacher_ema}"
        return self.teacher_model_server_url or cache or self.teacher_adapter_path or average

    def __post_init__(self):
        """The checks, behind TRL's."""
        super().__post_init__()
        self.check_teacher()

    def check_teacher(self) -> None:
        """Refuse what cannot work, and what would have no effect."""
        check_at_least(self, 1, "teacher_top_k")
        check_file(self, "teacher_deepspeed")
        self._check_places()
        self._check_absent()

    def check_trained_with(self) -> None:
        """Refuse a server beside a cache: `amid-trl cache-teacher` fills one from the other, training asks one."""
        if self.teacher_model_server_url is not None and self.reads_cache:
            raise ValueError(
                "teacher_cache has no effect beside teacher_model_server_url: `amid-trl cache-teacher` fills the "
                "cache from the server, teacher_cache_fill=True does while training; a training that reads the cache "
                "leaves teacher_model_server_url out"
            )

    def _check_places(self) -> None:
        chosen = [name for name in PLACES if getattr(self, name) not in (None, False)]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} exclude each other")
        placed_later = self.teacher_offload or self.teacher_deepspeed is not None
        if self.seq_kd and placed_later:
            raise ValueError(f"with seq_kd=True the teacher writes the text, which {chosen[0]} does not support")
        init_kwargs: Any = self.teacher_model_init_kwargs or {}
        device_map = init_kwargs.get("device_map")
        if device_map is not None and placed_later:
            raise ValueError(
                f"{chosen[0]} and device_map={device_map!r} in teacher_model_init_kwargs exclude each other"
            )

    def _check_absent(self) -> None:
        if self.teacher_ema is not None:
            check_shares(self, "teacher_ema")
            others = ("teacher_model_server_url", "teacher_adapter_path", "teacher_cache", *MODEL_FIELDS)
            without_effect(self, others, "beside teacher_ema")
            if self.seq_kd:
                raise ValueError("seq_kd=True needs a teacher with a model of its own, which writes the text")
        if self.teacher_adapter_path is not None:
            cache = ("teacher_cache",) if self.reads_cache else ()
            others = ("teacher_model_server_url", *cache, *MODEL_FIELDS)
            without_effect(self, others, "beside teacher_adapter_path")
            if self.seq_kd:
                raise ValueError("seq_kd=True needs a teacher with a model of its own, which writes the text")
        if self.teacher_model_server_url is not None:
            without_effect(self, MODEL_FIELDS, "beside teacher_model_server_url")
            check_url(self, "teacher_model_server_url")
            check_weights(self, "teacher_server_patience")
        else:
            without_effect(self, ("teacher_server_patience",), "without a teacher_model_server_url")
        self._check_cache()
        if self.seq_kd and (self.teacher_model_server_url is not None or self.teacher_cache is not None):
            raise ValueError("seq_kd=True needs a teacher in memory, which writes the text")

    def _check_cache(self) -> None:
        of_cache = ("teacher_cache_fill", "teacher_cache_states", "teacher_cache_dtype")
        if self.teacher_cache is None:
            without_effect(self, of_cache, "without a teacher_cache")
            if self.teacher_model_server_url is None:
                without_effect(self, ("teacher_top_k",), "on a teacher in memory")
            return
        if self.reads_cache and self.teacher_model_name_or_path is None and self.teacher_model_server_url is None:
            without_effect(self, MODEL_FIELDS, "on a teacher_cache that is read, without a teacher_model_name_or_path")
        if self.teacher_cache_fill or self.teacher_cache_states:
            without_effect(self, ("teacher_top_k",), "on a cache of hidden states")
            allowed = ("bfloat16", "float16", "float32")
        else:
            allowed = ("float16", "float32")
            if self.teacher_cache_dtype == "bfloat16" and holds_states(self.teacher_cache):
                raise ValueError(
                    f"the cache {self.teacher_cache} holds hidden states: teacher_cache_dtype='bfloat16' needs "
                    "teacher_cache_states=True beside it"
                )
        if self.teacher_cache_dtype is not None:
            check_choice(self, "teacher_cache_dtype", allowed)


def check_url(config: Any, name: str) -> None:
    """Refuse what is no server's address."""
    from urllib3.util import parse_url

    url = getattr(config, name)
    try:
        parsed = parse_url(url)
        ends = parsed.query is None and parsed.fragment is None  # what is asked for is written behind it
        is_address = parsed.scheme in ("http", "https") and parsed.host and ends
    except (AttributeError, TypeError, ValueError):
        is_address = False
    if not is_address or url != url.strip():
        raise ValueError(
            f"{name} must be http:// or https:// and a host, as http://there:8000 or https://there/path; got {url!r}"
        )
