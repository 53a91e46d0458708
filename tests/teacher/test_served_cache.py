"""`amid-trl cache-teacher` with a teacher on a server; test_absent_teacher.py trains from what it writes."""

import json
from functools import partial

import pytest
from datasets import Dataset
from server import HANG_UP, serving
from tiny import messages_dataset, save_tiny, tiny_llama

from amid_trl import cli
from amid_trl.launch import script
from amid_trl.launch.cache_teacher import main
from amid_trl.teacher.cache import TeacherCache
from amid_trl.teacher.server import TeacherServer


CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}


def test_the_command_fills_a_cache_from_a_server(tmp_path, tokenizer, teacher, monkeypatch, capsys):
    save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    messages_dataset(6).to_json(tmp_path / "data" / "train.jsonl")
    named = {"model_name_or_path": str(tmp_path / "student"), "dataset_name": str(tmp_path / "data")}
    places = {"output_dir": str(tmp_path / "out"), "teacher_cache": str(tmp_path / "cache")}
    settings = dict(CONFIG)
    settings |= {**named, **places, "teacher_top_k": 12, "teacher_cache_dtype": "float32", "lmbda": 0.0}
    (tmp_path / "run.yaml").write_text(json.dumps(settings))  # JSON is YAML
    config = ["--config", str(tmp_path / "run.yaml")]
    with serving(teacher, tokenizer=tokenizer) as server:
        url = ["--teacher_model_server_url", server.url]
        assert cli.main(["train", *config, *url]) == 2
        assert "teacher_cache has no effect beside teacher_model_server_url" in capsys.readouterr().err
        assert not (tmp_path / "cache").exists()
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as a launcher would
        assert cli.main(["cache-teacher", *config, *url]) == 0
    assert f"{tmp_path / 'cache'}: 6 rows" in capsys.readouterr().out
    assert cli.main(["train", *config]) == 0  # the server is gone
    assert "teacher_tail_mass" in capsys.readouterr().out


def test_a_server_that_dies_leaves_a_cache_to_go_on_with(tmp_path, tokenizer, teacher, monkeypatch, capsys):
    save_tiny(tmp_path / "student", tiny_llama(tokenizer), tokenizer)
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}] for i in range(40)]
    Dataset.from_list([{"messages": each} for each in turns]).to_json(tmp_path / "data" / "train.jsonl")
    settings = dict(CONFIG)
    settings |= {"model_name_or_path": str(tmp_path / "student"), "dataset_name": str(tmp_path / "data")}
    settings |= {"output_dir": str(tmp_path / "out"), "teacher_cache": str(tmp_path / "cache"), "lmbda": 0.0}
    settings |= {"teacher_top_k": 12, "teacher_server_patience": 0.5}
    monkeypatch.setattr("amid_trl.teacher.server.TeacherServer", partial(TeacherServer, batch_size=4))
    with serving(teacher) as server:
        settings["teacher_model_server_url"] = server.url
        (tmp_path / "run.yaml").write_text(json.dumps(settings))
        arguments = script.parse(["--config", str(tmp_path / "run.yaml")])
        asked = []

        def hangs_up(choices, prompts):
            """During the second sixteen, of which the requests have 4 rows, as the one that looks for company has."""
            asked.extend([prompts] * (len(prompts) == 4))
            server.faults += [HANG_UP] * 100 * (len(asked) == 6)
            return choices

        server.tamper = hangs_up
        with pytest.raises(script.NotTrained, match=r"did not answer.*cache keeps what is written: the same command"):
            main(*arguments)
        assert len(TeacherCache(tmp_path / "cache")) in (16, 32)  # the second sixteen may have been on their way
        server.faults.clear()
        server.tamper = lambda choices, prompts: choices
        main(*script.parse(["--config", str(tmp_path / "run.yaml")]))
    assert len(TeacherCache(tmp_path / "cache")) == 40
