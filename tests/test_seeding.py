"""Named seeds: the same everywhere, and no two consumers share one."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from ensemblelora.seeding import generator_for, seed_for

names = st.lists(
    st.integers(0, 100) | st.text(st.characters(codec="utf-8", exclude_characters="\x1f"), max_size=5), max_size=3
)


def test_seeds_are_the_same_on_every_machine_and_in_every_version():
    # Recorded once: a change would silently make every recorded run unrepeatable.
    assert seed_for(0, "projection", 3) == 3043549701296460868
    assert generator_for(0, "subsets").integers(0, 10**6, 4).tolist() == [79176, 200413, 66914, 18685]


@given(st.integers(0, 2**40), names)
def test_a_seed_is_a_pure_function_in_range(root, path):
    seed = seed_for(root, *path)
    assert 0 <= seed < 2**63
    assert seed == seed_for(root, *path)


@given(st.integers(0, 3), names, st.integers(0, 3), names)
def test_other_roots_or_names_give_other_seeds(root, path, other_root, other_path):
    assume((root, [(type(name), name) for name in path]) != (other_root, [(type(name), name) for name in other_path]))
    assert seed_for(root, *path) != seed_for(other_root, *other_path)


def test_a_number_and_its_text_are_different_names():
    assert seed_for(0, 1) != seed_for(0, "1")


def test_a_generator_is_not_moved_by_others_or_by_global_state():
    first = generator_for(0, "a")
    np.random.seed(1)  # noqa: NPY002 - the point: global state must not matter
    generator_for(0, "b").normal(size=100)
    assert np.array_equal(first.normal(size=5), generator_for(0, "a").normal(size=5))
