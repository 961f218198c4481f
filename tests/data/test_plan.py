"""The order of training: every item once in an epoch, whatever dies and however many go on."""

import functools
import itertools

import grain
import numpy as np
import pytest
from captioned_images import caption, encoded, pixels, write_folder, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdiff.core.errors import InputError
from jaxdiff.data.bad_samples import BadSampleCounter, BadSampleError
from jaxdiff.data.batches import batches
from jaxdiff.data.buckets import assign_buckets, bucket_sizes, read_image_sizes
from jaxdiff.data.samples import MapDataset, make_transform
from jaxdiff.data.sampling_order import BlockShuffleSampler, IndexSampler, validation_indices
from jaxdiff.data.sources.folder import FolderSource
from jaxdiff.data.sources.tars import TarSource


@pytest.fixture(autouse=True, scope="module")
def shuffled_once():
    """To shuffle a few numbers grain walks through 65536 of them: no number twice."""
    with pytest.MonkeyPatch.context() as patch:
        shuffle = functools.cache(grain.experimental.index_shuffle)
        patch.setattr(grain.experimental, "index_shuffle", shuffle)
        yield


def flat(lists):
    """The elements of all `lists` as one."""
    return list(itertools.chain.from_iterable(lists))


def items_of(plan, batch, batch_size):
    """The items of a global batch."""
    return [plan.item(plan[batch * batch_size + row]) for row in range(batch_size)]


groupings = st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(lambda n: sum(n) > 0)


def groups_of(counts):
    """Groups of these lengths of the items 0, 1, ... dealt out at random."""
    order = np.random.default_rng(len(counts)).permutation(sum(counts))
    return np.split(order, np.cumsum(counts)[:-1])


def shuffled(groups, batch_size, seed):
    return IndexSampler(groups, batch_size=batch_size, seed=seed)


def along_runs(groups, batch_size, seed):
    """The items are stored in runs of 7, and sorted in each group as sources have them."""
    starts, lanes = np.arange(0, 140, 7), int(np.gcd(batch_size, 4))
    return BlockShuffleSampler(groups, batch_size=batch_size, seed=seed, starts=starts, lanes=lanes)


@settings(deadline=None, max_examples=12)
@given(
    counts=groupings,
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31 - 1),
    made=st.sampled_from([shuffled, along_runs]),
)
def test_an_epoch_has_all_whole_batches_of_every_group_once(counts, batch_size, seed, made):
    groups = [np.sort(group) for group in groups_of(counts)]
    if max(counts) < batch_size:
        with pytest.raises(InputError, match=f"expected at least {batch_size}"):
            made(groups, batch_size, seed)
        return
    plan = made(groups, batch_size, seed)
    assert plan.batches == sum(count // batch_size for count in counts)
    for epoch in range(2):
        seen = []
        for batch in range(epoch * plan.batches, (epoch + 1) * plan.batches):
            (group,) = {plan[batch * batch_size + row].group for row in range(batch_size)}
            found = items_of(plan, batch, batch_size)
            assert set(found) <= set(groups[group].tolist())
            seen += found
        assert len(seen) == len(set(seen)) == plan.batches * batch_size
        for group in groups:  # all but a remainder that makes no batch
            assert len(set(group.tolist()) - set(seen)) == len(group) % batch_size


@pytest.mark.parametrize("made", [shuffled, along_runs])
def test_epochs_and_seeds_have_orders_of_their_own_and_mix_the_groups(made):
    groups = [np.arange(300), np.arange(300, 600)]

    def order(seed, epoch):
        plan = made(groups, 10, seed)
        return [items_of(plan, epoch * plan.batches + i, 10) for i in range(plan.batches)]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert orders[0] == order(0, 0)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = sum(a == b for a, b in zip(flat(orders[one]), flat(orders[other]), strict=True))
        assert same < 15  # 600 places, 1 expected
    kinds = [batch[0] >= 300 for batch in orders[0]]
    changes = sum(a != b for a, b in itertools.pairwise(kinds))
    assert 18 <= changes <= 42  # 30 expected of 59, one batch after the other would be 1
    inner = np.array([item for batch in orders[0] for item in batch if item < 300])
    assert abs(np.corrcoef(inner, np.arange(300))[0, 1]) < 0.25


def test_a_process_reads_few_runs_at_a_time_and_each_once():
    starts, batch_size, lanes = np.arange(0, 4001, 50), 32, 8
    plan = BlockShuffleSampler([np.arange(4000)], batch_size=batch_size, starts=starts, lanes=lanes)
    runs = []  # of the rows of the second of four processes: two lanes
    for batch in range(plan.batches):
        rows = range(batch * batch_size + 8, batch * batch_size + 16)
        runs.append({plan.item(plan[row]) // 50 for row in rows})
    assert max(map(len, runs)) <= 2 * 2  # a lane is in a run, or goes from one to the next
    assert len(set.union(*runs)) <= 80 / 4 + 2  # its quarter of all, and what it begins and ends in
    left = [i for i, (a, b) in enumerate(itertools.pairwise(runs)) for run in a - b]
    assert len(left) <= 80 / 4 + 2  # none is come back to


def test_runs_of_which_a_batch_cannot_be_made_evenly_are_refused():
    with pytest.raises(InputError, match="lanes: got 3, expected a divisor of 8"):
        BlockShuffleSampler([np.arange(20)], batch_size=8, starts=np.arange(0, 21, 5), lanes=3)


def test_what_is_held_out_is_spread_in_pieces():
    assert validation_indices(100, 64).tolist() == list(range(0, 100, 10))
    assert validation_indices(100, 6, 2).tolist() == [0, 1, 2, 50, 51, 52]
    assert validation_indices(100, 5, 2).tolist() == [0, 1, 2, 50, 51]
    assert validation_indices(9, 5, 2).tolist() == []


class Numbers:
    """Items that are their own numbers, of which some are broken."""

    def __init__(self, plan, broken=(), skipped=None):
        def make(index, place):
            if index in broken:
                raise BadSampleError("so it is")
            return {"n": index, "key": place}

        self.samples = MapDataset(plan, make, skipped or BadSampleCounter(1.0))


def read(samples, batch_size, start, stop, processes):
    """Global batches `start` to `stop`, restored from the state that any one process would save."""
    parts = []
    for index in range(processes):
        iterator = batches(
            samples,
            batch_size=batch_size,
            transform=lambda items: {"n": np.array([item["n"] for item in items])},
            process_index=index,
            process_count=processes,
            threads=index % 3,
        )
        iterator.set_state({"next_index": start})
        parts.append([next(iterator)["n"].tolist() for _ in range(stop - start)])
        assert iterator.get_state() == {"next_index": stop}
        iterator.close()
    return [flat(step) for step in zip(*parts, strict=True)]


@settings(deadline=None, max_examples=15)
@given(data=st.data(), counts=groupings.filter(lambda n: max(n) >= 12), seed=st.integers(0, 99))
def test_no_sample_is_lost_or_repeated_when_others_go_on(data, counts, seed):
    plan = IndexSampler(groups_of(counts), batch_size=12, seed=seed)
    stops, at = [], 0
    while at < plan.batches:
        at = data.draw(st.integers(at + 1, plan.batches))
        stops.append((at, data.draw(st.sampled_from([1, 2, 3, 4, 6]))))
    broken = data.draw(st.sets(st.integers(0, sum(counts) - 1), max_size=min(counts[0], 5)))
    samples = Numbers(plan).samples
    found, start = [], 0
    for stop, processes in stops:
        found += read(samples, 12, start, stop, processes)
        start = stop
    assert found == [items_of(plan, batch, 12) for batch in range(plan.batches)]
    seen = flat(found)
    assert len(set(seen)) == len(seen)

    if all(set(group.tolist()) - broken for group in groups_of(counts) if len(group) >= 12):
        whole = read(Numbers(plan, broken).samples, 12, 0, plan.batches, 1)
        shared = read(Numbers(plan, broken).samples, 12, 0, plan.batches, 3)
        assert whole == shared
        for before, after in zip(flat(found), flat(whole), strict=True):
            assert after not in broken
            assert before == after or before in broken


def test_a_substitute_is_the_next_whole_item_of_the_group():
    groups = [np.array([7, 3, 9]), np.array([1, 2, 4])]
    skipped = BadSampleCounter(1.0)
    samples = Numbers(IndexSampler(groups, batch_size=3), {9, 7, 4}, skipped).samples
    found = [samples[i] for i in range(6)]
    plan = IndexSampler(groups, batch_size=3)
    asked = [plan.item(plan[i]) for i in range(6)]
    instead = {9: 3, 7: 3, 4: 1, 3: 3, 1: 1, 2: 2}
    assert [item["n"] for item in found] == [instead[n] for n in asked]
    assert [item["key"] for item in found] == [plan[i] for i in range(6)]
    assert skipped.counts() == {"so it is": 4}  # 9, then 7; 7; 4


def test_too_many_broken_items_end_the_batches():
    plan = IndexSampler([np.arange(100)], batch_size=10)
    samples = Numbers(plan, set(range(0, 100, 5)), BadSampleCounter(0.1, floor=3)).samples
    iterator = batches(samples, batch_size=10, transform=lambda items: {"n": np.ones(1)})
    with pytest.raises(InputError, match=r"got 4 bad samples among \d+ \(4 so it is\)"):
        list(itertools.islice(iterator, 10))
    iterator.close()
    with pytest.raises(InputError, match=r"got 100 unreadable items in a row \(100 so"):
        Numbers(plan, set(range(100)), BadSampleCounter(1.0)).samples[0]


@given(count=st.integers(0, 5000), wanted=st.integers(0, 300))
def test_what_is_held_out_is_spread_and_at_most_a_tenth(count, wanted):
    held = validation_indices(count, wanted).tolist()
    assert len(set(held)) == len(held) == min(wanted, count // 10)
    assert all(0 <= index < count for index in held)
    if len(held) > 1:
        assert set(np.diff(held)) == {count // len(held)}


@given(cells=st.integers(1, 24), cell=st.sampled_from([8, 32, 64]), widest=st.floats(1, 4))
def test_buckets_have_about_one_area(cells, cell, widest):
    side = cells * cell
    sizes = bucket_sizes(side, multiple=cell, max_aspect_ratio=widest)
    assert (side, side) in sizes
    assert len(set(sizes)) == len(sizes)
    assert {(w, h) for h, w in sizes} == set(sizes)
    for h, w in sizes:
        assert h % cell == w % cell == 0
        assert max(h, w) <= widest * min(h, w) or h == w
        assert h * w <= side**2 < (min(h, w) + cell) * max(h, w)
    ratios = [w / h for h, w in sizes]
    assert ratios == sorted(ratios)


def test_the_buckets_of_sdxl_are_among_ours():
    # 2307.01952, appendix I: those with the largest area of each height
    published = [(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216)]
    ours = bucket_sizes(1024, multiple=64, max_aspect_ratio=4)
    assert {(832, 1216), (896, 1152), (1024, 1024), (1152, 896), (1216, 832)} <= set(ours)
    assert {(h, w) for h, w in published if h * w <= 1024**2 < (h + 64) * w} <= set(ours)


@settings(deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=1, max_size=60),
    batch_size=st.integers(1, 12),
)
def test_images_go_where_least_is_cropped_away(sizes, batch_size):
    buckets = bucket_sizes(512, multiple=64, max_aspect_ratio=2)
    found = assign_buckets(np.array(sizes), buckets, batch_size)
    assert sorted(np.concatenate([group for _, group in found]).tolist()) == [*range(len(sizes))]
    if len(found) > 1:
        assert all(len(group) >= batch_size for _, group in found)
    for (h, w), group in assign_buckets(np.array(sizes), buckets, 1):
        for index in group:
            height, width = (max(1, length) for length in sizes[index])

            def off(size, ratio=width / height):
                return abs(np.log(size[1] / size[0]) - np.log(ratio))

            assert off((h, w)) <= min(map(off, buckets)) + 1e-9


def test_the_smallest_bucket_joins_its_nearest_neighbour():
    sizes = [(512, 512)] * 9 + [(512, 640)] * 3 + [(512, 1024)] * 2
    buckets = [(512, 512), (448, 576), (384, 640), (320, 704)]
    found = assign_buckets(np.array(sizes), buckets, 4)
    assert [(size, len(group)) for size, group in found] == [((512, 512), 9), ((448, 576), 5)]


def test_sizes_are_measured_once_and_broken_images_have_none(tmp_path, monkeypatch):
    write_folder(tmp_path / "in", 6, sizes=((12, 10), (10, 30), (40, 8)))
    (tmp_path / "in" / "0001.png").write_bytes(b"nothing")
    exif = encoded(1, (300, 200), "JPEG", comment=b"x" * 65000, exif=b"Exif\0\0" + b"y" * 60000)
    (tmp_path / "in" / "0002.jpg").write_bytes(exif)  # its size lies beyond the part read first
    (tmp_path / "in" / "0002.png").unlink()
    source = FolderSource(str(tmp_path / "in"), BadSampleCounter())
    wanted = [[12, 10], [0, 0], [300, 200], [12, 10], [10, 30], [40, 8]]
    assert read_image_sizes(source, tmp_path / "cache").tolist() == wanted
    monkeypatch.setattr(FolderSource, "head", lambda *_: pytest.fail("measured again"))
    assert read_image_sizes(source, tmp_path / "cache").tolist() == wanted


def test_batches_of_a_bucket_have_one_shape_and_whole_samples(tmp_path):
    write_folder(tmp_path / "in", 24, sizes=((32, 32), (24, 40), (48, 20)))
    (tmp_path / "in" / "0003.png").write_bytes(encoded(0)[:50])
    source = FolderSource(str(tmp_path / "in"), BadSampleCounter())
    buckets = bucket_sizes(32, multiple=8, max_aspect_ratio=2)
    grouped = assign_buckets(read_image_sizes(source, tmp_path / "cache"), buckets, 4)
    sizes, groups = zip(*grouped, strict=True)
    skipped = BadSampleCounter()

    def samples():
        make = make_transform(source, sizes, seed=3, crop="random", flip=True)
        return MapDataset(IndexSampler(groups, batch_size=4, seed=3), make, skipped)

    def taken(count, processes=1, index=0):
        options = {"process_count": processes, "process_index": index, "threads": 2}
        iterator = batches(samples(), batch_size=4, **options)
        found = [next(iterator) for _ in range(count)]
        iterator.close()
        return found

    found = taken(12)
    shapes = {batch["image"].shape for batch in found}
    assert shapes == {(4, *size, 3) for size in sizes}
    assert len(shapes) > 1
    for batch in found:
        assert batch["time_ids"].shape == (4, 6)
        assert {tuple(row[4:]) for row in batch["time_ids"].tolist()} == {batch["image"].shape[1:3]}
    assert skipped.counts() == {"broken image": 2}  # once in each epoch
    for index in (0, 1):
        for whole, part in zip(found, taken(12, 2, index), strict=True):
            for name in whole:
                np.testing.assert_array_equal(whole[name][2 * index : 2 * index + 2], part[name])
    assert any(  # another crop or flip in the second epoch
        samples()[i]["image"].tobytes() not in {samples()[j]["image"].tobytes() for j in range(24)}
        for i in range(24, 48)
    )


def test_captions_stay_with_their_images(tmp_path):
    write_tar(tmp_path / "in" / "0.tar", range(12), "png")
    source = TarSource(str(tmp_path / "in"), BadSampleCounter(), cache=tmp_path / "cache")
    make = make_transform(source, [(12, 10)])
    samples = MapDataset(IndexSampler([np.arange(12)], batch_size=3), make, BadSampleCounter())
    for i in range(24):
        number = int(samples[i]["caption"].split()[-1])
        assert samples[i]["caption"] == caption(number)
        np.testing.assert_array_equal(samples[i]["image"], pixels(number))
