"""The state of a run comes back to the processes that go on with it, however many they are."""

from types import SimpleNamespace

import pytest
import torch

from amid_trl.data.batches import PromptTokens
from amid_trl.maths.schedules import AdaptiveShare
from amid_trl.sources.replay import ReplayBuffer, deal
from amid_trl.training.checkpoints import load_state, save_state


class Part:
    """A share and a buffer, as in a run."""

    def __init__(self, rank: int, rows: int = 0, capacity: int = 8):
        self.share = AdaptiveShare()
        self.buffer = ReplayBuffer(capacity, seed=rank)
        texts = [torch.tensor([rank, row]) for row in range(rows)]
        self.buffer.add([*map(PromptTokens, texts)], texts)

    def state_dict(self):
        return {"adaptive": self.share.state_dict(), "replay": self.buffer.state_dict()}

    def resume(self, states, rank, world):
        self.share.load_state_dict(states[0]["adaptive"])
        self.buffer.load_state_dict(deal([state["replay"] for state in states], rank, world))

    @property
    def rows(self) -> list[list[int]]:
        return self.buffer.state_dict()["ids"].view(-1, 4)[:, :2].tolist()


def saved(folder, processes: int, rows: int) -> list[Part]:
    parts = [Part(rank, rows) for rank in range(processes)]
    for rank, part in enumerate(parts):
        part.share.update(3.0)
        save_state(str(folder), (part,), SimpleNamespace(process_index=rank, num_processes=processes))
    return parts


def loaded(folder, processes: int, capacity: int = 8) -> list[Part]:
    parts = [Part(rank, capacity=capacity) for rank in range(processes)]
    for rank, part in enumerate(parts):
        load_state(str(folder), (part,), SimpleNamespace(process_index=rank, num_processes=processes))
    return parts


def test_as_many_processes_go_on_where_they_were(tmp_path):
    before, after = saved(tmp_path, 2, rows=3), loaded(tmp_path, 2)
    assert [part.rows for part in after] == [part.rows for part in before]
    assert all(part.share.reference == 3.0 for part in after)
    drawn = [[prompt.ids.tolist() for prompt in part.buffer.sample(3)[0]] for part in (before[1], after[1])]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("earlier", "later"), [(2, 1), (1, 2), (3, 2), (2, 3)])
def test_the_rows_are_dealt_anew_to_another_number_of_processes(tmp_path, earlier, later):
    before, after = saved(tmp_path, earlier, rows=2), loaded(tmp_path, later)
    assert sorted(row for part in after for row in part.rows) == sorted(row for part in before for row in part.rows)
    sizes = [len(part.rows) for part in after]
    assert max(sizes) - min(sizes) <= 1
    assert all(part.share.reference == 3.0 for part in after)


def test_rows_that_do_not_fit_are_the_oldest(tmp_path):
    saved(tmp_path, 2, rows=3)
    [alone] = loaded(tmp_path, 1, capacity=2)
    assert sorted(alone.rows) == [[0, 2], [1, 2]]


def test_files_that_more_processes_left_behind_are_not_read(tmp_path):
    saved(tmp_path, 3, rows=2)
    saved(tmp_path, 2, rows=1)
    [alone] = loaded(tmp_path, 1)
    assert sorted(alone.rows) == [[0, 0], [1, 0]]


def test_files_that_more_processes_left_behind_are_not_read_by_those_who_had_written_them(tmp_path):
    saved(tmp_path, 3, rows=2)
    saved(tmp_path, 2, rows=1)
    parts = loaded(tmp_path, 3)
    assert sorted(row for part in parts for row in part.rows) == [[0, 0], [1, 0]]


def test_as_many_processes_read_their_own_file_and_the_first(tmp_path, monkeypatch):
    saved(tmp_path, 4, rows=1)
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **how: read.append(file.name) or load(file, **how))
    alone = SimpleNamespace(process_index=2, num_processes=4)
    resumed = SimpleNamespace(
        state_dict=lambda: {"replay": None}, resume=lambda states, rank, world: states[rank]["replay"]
    )
    load_state(str(tmp_path), (resumed,), alone)
    assert read == ["distillation_state_0.pt", "distillation_state_2.pt"]


def test_no_state_is_no_file(tmp_path):
    stateless = SimpleNamespace(state_dict=dict, resume=lambda *_: pytest.fail("resumed"))
    alone = SimpleNamespace(process_index=0, num_processes=1)
    save_state(str(tmp_path / "none"), (stateless,), alone)
    assert not (tmp_path / "none").exists()
    load_state(str(tmp_path / "none"), (stateless,), alone)
    with pytest.raises(ValueError, match="none holds no state called adaptive, replay"):
        load_state(str(tmp_path / "none"), (stateless, Part(0)), alone)
