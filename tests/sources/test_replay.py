"""The replay buffer returns what went in, forgets the oldest first, and survives its checkpoint."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from amid_trl.data.batches import PromptTokens, completion_batch
from amid_trl.sources.replay import ReplayBuffer, deal


def rows(*numbers: int):
    """Prompts and completions that tell their number: number 3 is [3, 3, ...] and [1003, ...], lengths differ."""
    prompts = [PromptTokens(torch.full((1 + n % 3,), n)) for n in numbers]
    return prompts, [torch.full((1 + n % 5,), 1000 + n) for n in numbers]


def filled(capacity: int, numbers, seed: int = 0) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, seed)
    buffer.add(*rows(*numbers))
    return buffer


def numbers(state) -> list[int]:
    """The numbers of a state's rows, the oldest first, each checked to be whole."""
    found, start = [], 0
    for lengths in state["lengths"].tolist():
        n = int(state["ids"][start])
        [prompt], [completion] = rows(n)
        want = torch.cat([prompt.ids, completion])
        assert lengths == [len(prompt.ids), len(completion)]
        assert torch.equal(state["ids"][start : start + len(want)], want)
        found.append(n)
        start += len(want)
    assert start == len(state["ids"])
    return found


def draws(buffer: ReplayBuffer, times: int, count: int = 3) -> list[list[int]]:
    return [[int(prompt.ids[0]) for prompt in buffer.sample(count)[0]] for _ in range(times)]


def test_the_oldest_rows_leave_first():
    buffer = ReplayBuffer(4, seed=0)
    contents = []
    for n in range(0, 9, 2):
        buffer.add(*rows(n, n + 1))
        contents.append((numbers(buffer.state_dict()), buffer.full, len(buffer)))
    assert contents == [
        ([0, 1], False, 2),
        ([0, 1, 2, 3], True, 4),
        ([2, 3, 4, 5], True, 4),
        ([4, 5, 6, 7], True, 4),
        ([6, 7, 8, 9], True, 4),
    ]


def test_a_replayed_row_makes_the_batch_that_it_made_when_it_was_written():
    eos = 0
    prompts = [PromptTokens(torch.tensor([5, 6, 7])), PromptTokens(torch.tensor([8]), torch.tensor([3, 8]))]
    completions = [torch.tensor([9, eos]), torch.tensor([eos, eos, 4])]  # EOS is the padding here, and also inside
    buffer = ReplayBuffer(2, seed=0)
    buffer.add(prompts, completions)
    replayed_prompts, replayed_completions = buffer.sample(2)
    order = [0, 1] if len(replayed_prompts[0].ids) == 3 else [1, 0]
    want = completion_batch([prompts[i] for i in order], [completions[i] for i in order], pad_token_id=eos)
    got = completion_batch(replayed_prompts, replayed_completions, pad_token_id=eos)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_rows_are_copies_and_keep_no_larger_tensor_alive():
    generated = torch.arange(1000).view(10, 100)
    buffer = ReplayBuffer(10, seed=0)
    buffer.add([PromptTokens(row[:3]) for row in generated], [row[3:7] for row in generated])
    generated.zero_()
    prompts, completions = buffer.sample(10)
    assert sorted(int(prompt.ids[0]) for prompt in prompts) == list(range(0, 1000, 100))
    assert {row.untyped_storage().nbytes() for row in completions} == {4 * 8}
    buffer.load_state_dict(buffer.state_dict())
    assert {row.untyped_storage().nbytes() for row in buffer.sample(10)[1]} == {4 * 8}


def test_ids_are_kept_as_longs_on_the_cpu():
    buffer = ReplayBuffer(1, seed=0)
    short = [torch.tensor([n], dtype=torch.int32) for n in range(3)]
    buffer.add([PromptTokens(short[0], short[1])], [short[2]])
    [[prompt], [completion]] = buffer.sample(1)
    assert {part.dtype for part in (*prompt[:2], completion)} == {torch.int64}


def test_prompts_without_completions_change_nothing():
    buffer = filled(5, [1, 2])
    with pytest.raises(ValueError, match="zip"):
        buffer.add(rows(3, 4)[0], rows(3)[1])
    assert numbers(buffer.state_dict()) == [1, 2]


def test_samples_are_different_rows_with_equal_chances():
    buffer = filled(8, range(8))
    counts: Counter[int] = Counter()
    for drawn in draws(buffer, times=4000):
        assert len(set(drawn)) == 3
        counts.update(drawn)
    # Each row is in 3/8 of the samples; standard deviation sqrt(4000 * 3/8 * 5/8) = 30.6, five of them.
    assert len(counts) == 8
    assert all(abs(count - 1500) < 153 for count in counts.values())


def test_a_prompt_comes_with_its_own_completion():
    prompts, completions = filled(8, range(8)).sample(8)
    assert [int(text[0]) - int(prompt.ids[0]) for prompt, text in zip(prompts, completions, strict=True)] == [1000] * 8


def test_drawing_is_the_buffers_own_affair():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, same, other = filled(8, range(8), seed=1), filled(8, range(8), seed=1), filled(8, range(8), seed=2)
    drawn = draws(first, 5)
    torch.rand(1)
    assert drawn == draws(same, 5) != draws(other, 5)
    torch.set_rng_state(before)
    draws(first, 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_is_refused():
    for capacity in (0, -1):
        with pytest.raises(ValueError, match=f"capacity must be at least 1; got {capacity}"):
            ReplayBuffer(capacity, seed=0)
    with pytest.raises(ValueError, match="holds 2 rows; 3 were asked for"):
        filled(5, [1, 2]).sample(3)


# ---- Checkpoints ----


def saved_with_torch(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def saved_with_safetensors(state, path):
    save_file(state, path)
    return load_file(path)


@pytest.mark.parametrize("through_file", [saved_with_torch, saved_with_safetensors])
def test_a_loaded_buffer_goes_on_bit_for_bit(through_file, tmp_path):
    through = filled(6, range(9), seed=3)
    draws(through, 2)
    resumed = ReplayBuffer(6, seed=99)
    resumed.add(*rows(50, 51))
    resumed.load_state_dict(through_file(through.state_dict(), tmp_path / "replay"))
    for n in range(20, 40):
        assert draws(resumed, 2) == draws(through, 2)
        for buffer in (resumed, through):
            buffer.add(*rows(n))
    assert numbers(resumed.state_dict()) == numbers(through.state_dict())


def test_a_state_is_three_tensors_and_does_not_change_with_the_buffer():
    buffer = filled(6, range(4))
    state = buffer.state_dict()
    assert {name: (value.dtype, value.ndim) for name, value in state.items()} == {
        "ids": (torch.int64, 1),
        "lengths": (torch.int64, 2),
        "generator": (torch.uint8, 1),
    }
    generator = state["generator"].clone()
    draws(buffer, 3)
    buffer.add(*rows(7))
    assert numbers(state) == [0, 1, 2, 3]
    assert torch.equal(state["generator"], generator)


def test_an_empty_buffer_survives_too_and_loading_forgets_what_was_there(tmp_path):
    buffer = filled(3, [8, 9])
    buffer.load_state_dict(saved_with_safetensors(ReplayBuffer(3, seed=0).state_dict(), tmp_path / "replay"))
    assert len(buffer) == 0
    buffer.add(*rows(1))
    assert numbers(buffer.state_dict()) == [1]


def test_a_smaller_buffer_loads_the_newest_rows_and_stays_small():
    buffer = ReplayBuffer(3, seed=0)
    buffer.load_state_dict(filled(8, range(8)).state_dict())
    assert numbers(buffer.state_dict()) == [5, 6, 7]
    buffer.add(*rows(8))
    assert numbers(buffer.state_dict()) == [6, 7, 8]


def test_prompts_of_the_teachers_survive_and_are_dealt(tmp_path):
    prompts = [PromptTokens(torch.tensor([n]), torch.tensor([n, n]) if n % 2 else None) for n in range(5)]
    buffer = ReplayBuffer(5, seed=0)
    buffer.add(prompts, [torch.tensor([100 + n]) for n in range(5)])
    state = saved_with_torch(buffer.state_dict(), tmp_path / "replay")
    hands = [ReplayBuffer(5, seed=1) for _ in range(2)]
    for rank, hand in enumerate(hands):
        hand.load_state_dict(deal([state], rank, 2))
    rows = [row for hand in hands for row in zip(*hand.sample(len(hand)), strict=True)]
    assert len(rows) == 5
    for prompt, completion in rows:
        n = int(prompt.ids)
        assert completion.tolist() == [100 + n]
        assert (prompt.teacher_ids is None) if n % 2 == 0 else (prompt.teacher_ids.tolist() == [n, n])


def test_rows_keep_the_number_of_their_teacher(tmp_path):
    buffer = ReplayBuffer(5, seed=0)
    prompts = [PromptTokens(torch.tensor([n]), teacher=n % 3) for n in range(5)]
    buffer.add(prompts, [torch.tensor([100 + n]) for n in range(5)])
    hand = ReplayBuffer(5, seed=1)
    hand.load_state_dict(deal([saved_with_torch(buffer.state_dict(), tmp_path / "replay")], 1, 2))
    assert len(hand) == 2
    for prompt, completion in zip(*hand.sample(2), strict=True):
        assert (prompt.teacher, completion.tolist()) == (int(prompt.ids) % 3, [100 + int(prompt.ids)])


# ---- Another number of processes ----


def states_of(*contents):
    return [filled(max(1, len(content)), content, seed).state_dict() for seed, content in enumerate(contents)]


# Row 10 a + r is the a-th that process r wrote.
EQUAL = [[10 * age + rank for age in range(6)] for rank in range(3)]
UNEQUAL = [[0, 10, 20, 30, 40], [21, 31, 41], []]


@pytest.mark.parametrize("world_size", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("contents", [EQUAL, UNEQUAL])
def test_dealing_loses_nothing_and_doubles_nothing(contents, world_size):
    states = states_of(*contents)
    hands = [numbers(deal(states, rank, world_size)) for rank in range(world_size)]
    assert sorted(n for hand in hands for n in hand) == sorted(n for content in contents for n in content)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    for hand in hands:
        ages = [n // 10 for n in hand]
        assert ages == sorted(ages)  # the oldest is still the first to leave


def test_dealing_by_hand():
    # From the newest: 50 51 52 40 41 42 30 ... in turn to two processes, who keep the newest last.
    states = states_of(*EQUAL)
    assert numbers(deal(states, 0, 2)) == [1, 12, 10, 21, 32, 30, 41, 52, 50]
    assert numbers(deal(states, 1, 2)) == [2, 0, 11, 22, 20, 31, 42, 40, 51]


def test_what_does_not_fit_after_dealing_is_the_oldest():
    kept = []
    for rank in range(2):
        buffer = ReplayBuffer(6, seed=0)
        buffer.load_state_dict(deal(states_of(*EQUAL), rank, 2))
        kept += numbers(buffer.state_dict())
    assert sorted(kept) == [n for age in range(2, 6) for n in (10 * age, 10 * age + 1, 10 * age + 2)]


@pytest.mark.parametrize("contents", [EQUAL, UNEQUAL])
def test_the_same_number_of_processes_keeps_its_buffers(contents):
    states = states_of(*contents)
    for rank, state in enumerate(states):
        dealt = deal(states, rank, 3)
        assert all(torch.equal(dealt[name], state[name]) for name in state)


def test_dealing_is_repeatable_and_all_processes_draw_differently():
    states = states_of(*EQUAL)
    generators = [deal(states, rank, 8)["generator"] for rank in range(8)]
    assert all(torch.equal(deal(states, rank, 8)["generator"], generators[rank]) for rank in range(8))
    # Old processes draw on; the new ones, of the second and third round, draw something else.
    assert all(torch.equal(generators[rank], states[rank]["generator"]) for rank in range(3))
    assert len({bytes(generator.tolist()) for generator in generators}) == 8
