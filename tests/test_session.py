"""Sessions: the same video whatever the batch, exact snapshots, live prompts, continuation."""

import copy

import pytest
import torch
from tiny import tiny_models
from torch import Tensor

from longlive.errors import InputError
from longlive.inference.session import (
    Models,
    Past,
    Session,
    SessionConfig,
    block_noise,
    decoder_memory_frames,
    to_uint8,
)
from longlive.models.kv_cache import CacheConfig
from longlive.rollout import SamplerConfig

SAMPLER = SamplerConfig(steps=(1000, 500), frames_per_block=2)


def config(**changes: object) -> SessionConfig:
    return SessionConfig(height=32, width=48, sampler=SAMPLER, cache=CacheConfig(6, 2), **changes)


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny_models()


def latents_of(session: Session, num_blocks: int) -> Tensor:
    return torch.cat([session.next_chunk().latents for _ in range(num_blocks)], dim=1)


def test_same_video_whatever_the_batch(models: Models) -> None:
    prompts, seeds = ["a red ball", "snow falls on a road", "a red ball"], [3, 4, 5]
    together = Session(models, config(), seeds)
    together.set_prompt(prompts)
    chunks = [together.next_chunk() for _ in range(5)]
    together.set_prompt(["green", "blue", "green"])
    chunks += [together.next_chunk() for _ in range(3)]
    for i, (prompt, second) in enumerate(zip(prompts, ["green", "blue", "green"], strict=True)):
        alone = Session(models, config(), seeds[i : i + 1])
        for block, chunk in enumerate(chunks):
            alone.set_prompt(prompt if block < 5 else second)
            mine = alone.next_chunk()
            torch.testing.assert_close(mine.latents, chunk.latents[i : i + 1], atol=5e-5, rtol=0.0)
            difference = (mine.pixels.int() - chunk.pixels[i : i + 1].int()).abs()
            assert difference.max() <= 1


def test_snapshot_and_restore_continue_identically(models: Models) -> None:
    session = Session(models, config(), [0])
    session.set_prompt("a cat")
    for _ in range(5):
        session.next_chunk()
    session.set_prompt("a dog")
    snapshot = session.snapshot()
    first = [session.next_chunk() for _ in range(4)]
    session.set_prompt("a bird")
    session.next_chunk()
    for _ in range(2):  # a snapshot can be used more than once
        session.restore(snapshot)
        again = [session.next_chunk() for _ in range(4)]
        for a, b in zip(first, again, strict=True):
            assert a.start_frame == b.start_frame
            assert torch.equal(a.latents, b.latents)
            assert torch.equal(a.pixels, b.pixels)


def test_branching_from_a_snapshot_follows_the_other_prompt(models: Models) -> None:
    session = Session(models, config(), [0])
    session.set_prompt("a cat")
    latents_of(session, 4)
    snapshot = session.snapshot()
    stayed = latents_of(session, 2)
    session.restore(snapshot)
    session.set_prompt("a dog")
    branched = latents_of(session, 2)
    assert (stayed - branched).abs().max() > 1e-3


def test_same_prompt_again_changes_nothing(models: Models) -> None:
    once, often = (Session(models, config(), [0]) for _ in range(2))
    once.set_prompt("a cat")
    expected = latents_of(once, 4)
    found = []
    for _ in range(4):
        often.set_prompt("a cat")
        found.append(often.next_chunk().latents)
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_pieces_are_the_whole_decode(models: Models) -> None:
    session = Session(models, config(), [7])
    session.set_prompt("a cat")
    chunks = [session.next_chunk() for _ in range(4)]
    assert [chunk.pixels.shape[1] for chunk in chunks] == [5, 8, 8, 8]
    with torch.no_grad():
        whole = to_uint8(models.vae.decode(torch.cat([chunk.latents for chunk in chunks], dim=1)))
    assert torch.equal(torch.cat([chunk.pixels for chunk in chunks], dim=1), whole)


def test_continuation_of_a_clip(models: Models) -> None:
    clip = torch.rand(1, 9, 3, 32, 48) * 2 - 1
    session = Session(models, config(), [0, 1])
    session.set_prompt("a cat")
    first = session.start_from(clip)
    assert first.pixels.shape == (2, 9, 32, 48, 3)
    assert session.num_frames == 3
    with torch.no_grad():
        encoded = models.vae.encode(clip)
    torch.testing.assert_close(first.latents, encoded.expand(2, -1, -1, -1, -1), atol=1e-5, rtol=0.0)
    chunk = session.next_chunk()
    assert (chunk.start_frame, chunk.pixels.shape[1]) == (3, 8)
    without = Session(models, config(), [0, 1])
    without.set_prompt("a cat")
    without.start_from(torch.zeros_like(clip))
    assert (without.next_chunk().latents - chunk.latents).abs().max() > 1e-3


def test_every_switch_policy_and_position_runs(models: Models) -> None:
    for policy in ("keep", "rewrite"):
        for relative in (False, True):
            settings = SessionConfig(32, 48, SAMPLER, CacheConfig(6, 2, relative), policy)
            session = Session(models, settings, [0])
            for prompt in ("a", "b", "c"):
                session.set_prompt(prompt)
                assert torch.isfinite(latents_of(session, 3)).all()


def test_noise_depends_on_seed_position_and_step_alone() -> None:
    noise = block_noise(1, 6, 2, (2, 4, 4, 6))
    assert torch.equal(noise, block_noise(1, 6, 2, (2, 4, 4, 6)))
    for other in ((2, 6, 2), (1, 7, 2), (1, 6, 3), (16, 2, 1)):
        assert not torch.equal(noise, block_noise(*other, (2, 4, 4, 6)))
    many = torch.stack([block_noise(seed, 0, 0, (64, 64)) for seed in range(16)])
    assert abs(many.mean().item()) < 0.02
    assert abs(many.std().item() - 1) < 0.02


def test_wrong_use(models: Models) -> None:
    with pytest.raises(InputError, match="multiples of 16"):
        Session(models, SessionConfig(40, 48, SAMPLER, CacheConfig(6, 2)), [0])
    session = Session(models, config(), [0, 1])
    with pytest.raises(InputError, match="3 prompts for 2 videos"):
        session.set_prompt(["a", "b", "c"])


def test_sessions_share_models_without_touching_each_other(models: Models) -> None:
    before = copy.deepcopy(models.generator.state_dict())
    sessions = [Session(models, config(), [seed]) for seed in (0, 1)]
    alone = []
    for session in sessions:
        session.set_prompt("a cat")
    interleaved: list[list[Tensor]] = [[], []]
    for _ in range(4):
        for i, session in enumerate(sessions):
            interleaved[i].append(session.next_chunk().latents)
    for seed in (0, 1):
        session = Session(models, config(), [seed])
        session.set_prompt("a cat")
        alone.append(latents_of(session, 4))
    for i in range(2):
        assert torch.equal(torch.cat(interleaved[i], dim=1), alone[i])
    for name, tensor in models.generator.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# Of every chunk: its prompt, one letter each. The first window, 6 frames, is 3 chunks; 2 layers of 4 frames are 4.
@pytest.mark.parametrize(
    ("course", "policy", "relative", "with_clip"),
    [
        ("A", "keep", False, True),
        ("AAB", "keep", False, False),
        ("AAABBB", "keep", True, True),
        ("AABBAAACCAA", "keep", False, False),
        ("AABBAAACCAA", "rewrite", True, False),
        ("AAAABAA", "keep", True, False),
        ("AAAABAA", "rewrite", False, True),
        ("A" * 10, "keep", False, False),
        ("A" * 10, "rewrite", False, False),
    ],
)
def test_resume_goes_on_identically(models: Models, course: str, policy: str, relative: bool, with_clip: bool) -> None:
    settings = SessionConfig(32, 48, SAMPLER, CacheConfig(6, 2, relative), policy)
    unbroken, resumed = (Session(models, settings, [3, 4]) for _ in range(2))
    past = []
    for number, prompt in enumerate(course):
        unbroken.set_prompt(prompt)
        if with_clip and number == 0:
            clip = unbroken.start_from(torch.rand(1, 1, 3, 32, 48) * 2 - 1)
            past.append(Past((prompt,) * 2, clip.latents))
        past.append(Past((prompt,) * 2, unbroken.next_chunk().latents))
    for _ in resumed.resume(past):
        pass
    assert resumed.num_frames == unbroken.num_frames
    for prompt in (course[-1], "D", "D", "D"):
        for session in (unbroken, resumed):
            session.set_prompt(prompt)
        expected, found = unbroken.next_chunk(), resumed.next_chunk()
        assert torch.equal(found.latents, expected.latents)
        assert torch.equal(found.pixels, expected.pixels)


def test_decoder_forgets_what_is_beyond_its_memory(models: Models) -> None:
    memory = decoder_memory_frames(models.vae)
    latents = torch.randn(1, memory + 8, 4, 2, 2)
    whole, newest = models.vae.new_cache(), models.vae.new_cache()
    models.vae.decode(latents, whole)
    models.vae.decode(latents[:, -memory:], newest)
    following = torch.randn(1, 1, 4, 2, 2)
    expected = models.vae.decode(following, whole)
    assert torch.equal(models.vae.decode(following, newest), expected)
    shorter = models.vae.new_cache()
    models.vae.decode(latents[:, -memory // 3 :], shorter)
    assert not torch.equal(models.vae.decode(following, shorter), expected)


def test_resume_leaves_out_what_is_forgotten(models: Models) -> None:
    decoded = decoder_memory_frames(models.vae)
    calm = [Past(("A",), torch.randn(1, 2, 4, 4, 6)) for _ in range(60)]
    switched = [*calm, Past(("B",), torch.randn(1, 2, 4, 4, 6))]
    for past, replayed in ((calm, 4 + 4), (switched, 4 + 1)):  # the first window and the block at its end; the newest
        assert sum(1 for _ in Session(models, config(), [0]).resume(past)) == replayed + decoded
