"""A cache with a cap in bytes: what was used last stays."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from hypothesis import given
from hypothesis import strategies as st

from blindtune.server.cache import ByteLRU


def test_the_least_recently_used_go_first_until_the_new_one_fits():
    cache = ByteLRU[str, int](10)
    for key, size in (("a", 4), ("b", 3), ("c", 3)):
        assert cache.put(key, ord(key), size)
    assert cache.get("a") == ord("a")  # now b is the oldest
    assert cache.put("d", 0, 5)
    assert cache.get("b") is None
    assert cache.get("c") is None
    assert (cache.get("a"), cache.get("d")) == (ord("a"), 0)
    assert (cache.nbytes, len(cache)) == (9, 2)


def test_bytes_count_and_not_items():
    cache = ByteLRU[int, int](100)
    for key in range(1000):
        cache.put(key, key, 1)
    assert (len(cache), cache.nbytes) == (100, 100)
    cache.put(-1, 0, 100)
    assert (len(cache), cache.nbytes) == (1, 100)


def test_what_is_larger_than_the_cache_is_not_kept_and_drives_nothing_out():
    cache = ByteLRU[str, int](10)
    cache.put("a", 1, 6)
    assert not cache.put("b", 2, 11)
    assert (cache.get("a"), cache.get("b")) == (1, None)


def test_a_key_that_is_put_again_counts_once():
    cache = ByteLRU[str, int](10)
    cache.put("a", 1, 6)
    cache.put("a", 2, 9)
    assert (cache.get("a"), cache.nbytes, len(cache)) == (2, 9, 1)
    assert not cache.put("a", 3, 11)
    assert (cache.get("a"), cache.nbytes) == (None, 0), "the old value would be wrong"


def test_pop_takes_the_value_out():
    cache = ByteLRU[str, int](10)
    cache.put("a", 1, 6)
    assert (cache.pop("a"), cache.pop("a"), cache.nbytes) == (1, None, 0)


def test_every_change_of_size_is_reported():
    sizes: list[int] = []
    cache = ByteLRU[str, int](10, sizes.append)
    cache.put("a", 1, 6)
    cache.put("b", 1, 5)
    cache.pop("b")
    assert sizes == [6, 5, 0]


@given(st.lists(st.tuples(st.sampled_from(["put", "get", "pop"]), st.integers(0, 5), st.integers(0, 8)), max_size=60))
def test_it_behaves_like_the_simplest_model_of_itself(actions: list[tuple[str, int, int]]):
    cache, model = ByteLRU[int, object](12), OrderedDict[int, tuple[object, int]]()
    for action, key, size in actions:
        if action == "put":
            value = object()
            model.pop(key, None)
            if size <= 12:
                model[key] = (value, size)
                while sum(s for _, s in model.values()) > 12:
                    model.popitem(last=False)
            assert cache.put(key, value, size) == (key in model)
        elif action == "get":
            if key in model:
                model.move_to_end(key)
            assert cache.get(key) is (model[key][0] if key in model else None)
        else:
            assert cache.pop(key) is model.pop(key, (None, 0))[0]
        assert (cache.nbytes, len(cache)) == (sum(s for _, s in model.values()), len(model))


def test_threads_never_exceed_the_cap_or_lose_count():
    seen: list[int] = []
    cache = ByteLRU[int, int](50, seen.append)

    def work(seed: int) -> None:
        for i in range(300):
            key = (seed * 31 + i * 7) % 40
            cache.put(key, key, key % 9)
            assert cache.get(key) in (key, None)
            cache.pop((key + 5) % 40)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert max(seen) <= 50
    for key in range(40):
        cache.pop(key)
    assert (cache.nbytes, len(cache)) == (0, 0)
