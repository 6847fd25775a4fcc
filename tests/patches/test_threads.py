"""Several threads put patches on one model and take them off: each is all on or all off, and the originals stay."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_lm

from lmpatch.api import fit
from lmpatch.data.edits import Edit
from lmpatch.models.lm import _locks
from lmpatch.patches.ledger import applied, apply, suspended


def run(count: int, work: Callable[[int], None]) -> None:
    """``work(i)`` in so many threads at once; what one raises is raised here."""
    failed: list[BaseException] = []
    start = threading.Barrier(count)

    def go(i: int) -> None:
        start.wait()
        try:
            work(i)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 8])
def test_threads_that_apply_and_remove_at_once_leave_the_model_as_it_was(count, mount, random_patch, bits) -> None:
    lm = tiny_lm("llama")
    was, patches = bits(lm), [random_patch(lm, seed=10 * i, layers=(0, 1)) for i in range(count)]
    expected = []
    for patch in patches:
        with apply(lm, patch):
            expected.append(bits(lm))

    def work(i: int) -> None:
        for _ in range(10):
            on = apply(lm, patches[i], mount)
            if mount == "bake":
                with lm.lock:
                    assert len(applied(lm)) > 1 or bits(lm) == expected[i]
            on.remove()

    run(count, work)
    assert applied(lm) == () and bits(lm) == was
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


@pytest.mark.slow
def test_no_other_thread_sees_the_model_while_its_patches_are_suspended(random_patch, logits) -> None:
    lm = tiny_lm("llama")
    patch, seen = random_patch(lm), []
    with apply(lm, patch):
        want = logits(lm)

        def work(i: int) -> None:
            for _ in range(20):
                if i:
                    with suspended(lm):
                        assert applied(lm) == ()
                else:
                    with lm.lock:
                        seen.append(torch.equal(logits(lm), want))

        run(3, work)
    assert all(seen) and len(seen) == 20


def test_a_model_in_use_waits_for_nobody_once_a_thread_failed(random_patch) -> None:
    lm = tiny_lm("llama")
    patch = random_patch(tiny_lm("llama", seed=3))

    def work(i: int) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            apply(lm, patch)

    run(4, work)
    assert _locks[lm.model].acquire(timeout=1)
    _locks[lm.model].release()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [("finetune", {"epochs": 20}), ("memit", {"steps": 4, "layers": [1, 2]}), ("rome", {"layer": 1})],
)
def test_a_fit_makes_the_same_patch_while_others_put_theirs_on_and_off(method, settings, random_patch, bits) -> None:
    lm = tiny_lm("llama")
    was, edits = bits(lm), [Edit("The Eiffel Tower is in", "Rome", "Eiffel Tower")]
    patch, text = random_patch(lm, layers=(0, 1, 2, 3)), ["The tower of Rome is in Italy ."] * 120

    def make() -> dict[str, torch.Tensor]:
        more = {} if method == "finetune" else {"text": text}
        return fit(lm, method, edits, force=True, **more, **settings).tensors()

    wanted = [make()]
    with apply(lm, patch):  # the other thread's patch is on from the beginning to the end of a fit, or not at all
        wanted.append(make())
    done, found = threading.Event(), []

    def work(i: int) -> None:
        if i == 0:
            try:
                for _ in range(3):
                    found.append(make())
            finally:
                done.set()
        while not done.is_set():
            apply(lm, patch).remove()

    run(2, work)
    assert bits(lm) == was and applied(lm) == ()
    for one in found:
        assert any(all(torch.equal(t, one[name]) for name, t in whole.items()) for whole in wanted)
