from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from polar.serving.batcher import SHORTEST, Row, shared_trees

ids = st.lists(st.integers(0, 3), min_size=1, max_size=3 * SHORTEST)
START = list(range(100, 100 + 2 * SHORTEST))


@st.composite
def families(draw) -> list[list[int]]:
    """Sequences of which many begin alike, some are equal, some begin others."""
    stems = draw(st.lists(ids, min_size=1, max_size=4))
    return [draw(st.sampled_from(stems)) + draw(ids) for _ in range(draw(st.integers(1, 20)))]


def common(left: list[int], right: list[int]) -> int:
    return next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


@given(families())
def test_trees_hold_every_sequence_once_and_only_what_all_members_share(sequences: list[list[int]]) -> None:
    trees = shared_trees(sequences)
    assert sorted(member for tree in trees for member in tree.members) == list(range(len(sequences)))
    for tree in trees:
        members = [sequences[member] for member in tree.members]
        assert all(ids[: tree.prefix] == members[0][: tree.prefix] for ids in members)
        assert all(len(ids) > tree.prefix for ids in members)
        assert tree.prefix == 0 or (tree.prefix >= SHORTEST and len(members) > 1)


@given(families())
def test_no_two_trees_side_by_side_would_be_better_as_one(sequences: list[list[int]]) -> None:
    for left, right in pairwise(shared_trees(sequences)):
        members = [sequences[member] for member in left.members + right.members]
        prefix = min(min(common(members[0], ids), len(ids) - 1) for ids in members)
        apart = (len(left.members) - 1) * left.prefix + (len(right.members) - 1) * right.prefix
        assert prefix < SHORTEST or (len(members) - 1) * prefix <= apart


def test_a_stranger_that_shares_little_does_not_spoil_a_family() -> None:
    family = [[*START, *START, number] for number in range(5)]
    stranger = [*START[: SHORTEST + 1], 7, 8, 9]
    for sequences in ([stranger, *family], [*family, stranger]):
        trees = shared_trees(sequences)
        assert {(tree.prefix, len(tree.members)) for tree in trees} == {(0, 1), (4 * SHORTEST, 5)}


def test_equal_sequences_share_all_but_their_last_token() -> None:
    (tree,) = shared_trees([START] * 3)
    assert tree.prefix == len(START) - 1


@given(families())
def test_a_row_knows_what_the_nearest_sequence_in_it_shares(sequences: list[list[int]]) -> None:
    row = Row()
    for number, ids in enumerate(sequences):
        most = max((min(common(ids, other), len(ids) - 1, len(other) - 1) for other in sequences[:number]), default=0)
        shared = row.add(ids)
        # One less where the nearest sequence begins or continues this one: the last token is never shared.
        assert shared in (most, most - 1) or (shared == 0 and most <= SHORTEST)
