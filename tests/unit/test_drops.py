from fastpath.drops import DropReason


def test_no_reason_is_zero_which_means_forwarded() -> None:
    assert all(reason > 0 for reason in DropReason)


def test_values_are_dense_so_that_they_index_the_counters() -> None:
    assert sorted(DropReason) == list(range(1, len(DropReason) + 1))


def test_no_two_names_share_a_value() -> None:
    assert len(DropReason.__members__) == len(set(DropReason))
