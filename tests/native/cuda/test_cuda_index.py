"""Where the CUDA kernels put every number: their own index functions, called exhaustively."""

from __future__ import annotations

from itertools import product

import cuda_emulator
import pytest
from cuda_emulator import A100_SHARED, H200_SHARED

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="needs a C++ compiler")

ITEMS = (2, 4)  # bytes of a feature
LANES = range(32)


@pytest.fixture
def index(emulator):
    return emulator


def banks(offset: int, size: int) -> set[int]:
    return {(offset // 4 + i) % 32 for i in range(size // 4)}


def test_natural_order_agrees_with_the_instruction(index) -> None:
    """Words of an A operand that ldmatrix loads, and of the B operand packed to match."""
    for step in range(2):
        # ldmatrix: word w of lane t from matrix w, whose rows are 8 columns (a chunk) of 8 rows.
        a = {(t, half, e): 16 * step + 8 * half + 2 * t + e
             for t, half, e in product(range(4), range(2), range(2))}  # fmt: skip
        b = {(t, half, e): index.natural_column(0, t, 2 * step + half) + e
             for t, half, e in product(range(4), range(2), range(2))}  # fmt: skip
        assert a == b
    columns = [
        index.natural_column(group, t, word) + e
        for group, t, word, e in product(range(3), range(4), range(4), range(2))
    ]
    assert sorted(columns) == list(range(96))


def test_norms_lie_in_one_lane_each(index) -> None:
    """Rows times themselves: where row and column of an accumulator are the same."""
    for half in range(2):
        for g in range(8):
            lane, number = 4 * g + g // 2, 2 * half + g % 2
            assert index.accumulator_row(lane, number) == g + 8 * half
            assert index.accumulator_column(lane, number) == g


def test_fragments_agree_with_the_instruction(index) -> None:
    """Sum over k of A(row, k) B(k, column), in the lanes' own order, is every product once."""
    for item in ITEMS:
        columns = 4 * (16 // item)
        for step in range(2 if item == 2 else 1):
            # Columns of the features that A and B hold as k = 2 t + {0, 1} + 8 half.
            a = {}
            for t, half, e in product(range(4), range(2), range(2)):
                a[t, half, e] = t * (16 // item) + (2 * (2 * step + half) + e)
            b = {
                (t, half, e): index.operand_column(item, 0, t, 2 * step + half) + e
                for t, half, e in product(range(4), range(2), range(2))
            }
            assert a == b
            assert len(set(a.values())) == 16 and max(a.values()) < columns
    for lane in LANES:
        assert index.operand_class(3, lane) == 24 + lane // 4
        for i in range(4):
            assert index.accumulator_row(lane, i) == lane // 4 + 8 * (i // 2)
            assert index.accumulator_column(lane, i) == 2 * (lane % 4) + i % 2
    places = {
        (index.accumulator_row(lane, i), index.accumulator_column(lane, i))
        for lane, i in product(LANES, range(4))
    }
    assert places == set(product(range(16), range(8)))


@pytest.mark.parametrize("item", ITEMS)
def test_groups_hold_every_column_once(index, item) -> None:
    for dim in (1, 7, 32, 33, 100, 513, 2048):
        groups = index.groups_of(item, dim)
        columns = sorted(
            index.operand_column(item, group, t, word) + e
            for group in range(groups)
            for t, word, e in product(range(4), range(index.operand_words(item)), range(2))
        )
        assert columns == list(range(len(columns))) and len(columns) >= dim
        assert len(columns) - dim < 4 * (16 // item)
        assert index.row_bytes(item, dim) >= len(columns) * item  # what the kernel reads of a row


@pytest.mark.parametrize("item", ITEMS)
@pytest.mark.parametrize("terms", [1, 2, 3])
def test_packed_operand_has_no_overlap(index, item, terms) -> None:
    size = index.operand_lane_bytes(item, terms)
    for classes, dim in product((1, 7, 10, 33, 80), (1, 65, 512)):
        blocks = index.operand_blocks(item, terms)
        offsets = [
            index.operand_offset(item, terms, classes, group, block, cls, t)
            for group in range(index.groups_of(item, dim))
            for block, cls, t in product(range(blocks), range(classes), range(4))
        ]
        assert sorted(offsets) == [size * i for i in range(len(offsets))]
        assert len(offsets) * size == index.operand_bytes(item, terms, classes, dim)
        # A number is stored as two bytes a term, or whole.
        numbers = len(offsets) // blocks * (16 // item)
        each = 2 * terms if terms <= 2 else 4
        assert len(offsets) * size == numbers * each


@pytest.mark.parametrize("item", ITEMS)
def test_staged_rows_have_no_overlap(index, item) -> None:
    for dim in (1, 64, 65, 100, 512, 2048):
        bytes_of_row, pitch = index.row_bytes(item, dim), index.row_pitch(item, dim)
        assert bytes_of_row % 128 == 0 and dim * item <= bytes_of_row < pitch and pitch % 16 == 0
        offsets = [
            index.feature_offset(row, chunk, pitch)
            for row, chunk in product(range(16), range(bytes_of_row // 16))
        ]
        # A row is one piece, as a bulk copy leaves it.
        assert offsets == [r * pitch + c for r in range(16) for c in range(0, bytes_of_row, 16)]


@pytest.mark.parametrize("dim", [32, 64, 256, 1024])
def test_reads_of_staged_rows_meet_no_bank_twice(index, dim) -> None:
    bytes_of_row, pitch = index.row_bytes(4, dim), index.row_pitch(4, dim)
    chunks = bytes_of_row // 16
    for first_row, chunk in product((0, 8), range(chunks)):
        # ldmatrix: a column of chunks over eight rows.
        used = [banks(index.feature_offset(first_row + row, chunk, pitch), 16) for row in range(8)]
        assert len(set().union(*used)) == 32
    for group, pair in product(range(chunks // 4), range(4)):
        # 16 bytes a lane: eight lanes at once, the four chunks of a group in two rows.
        used = [
            banks(
                index.feature_offset(
                    index.logit_row(2 * pair + lane // 4), 4 * group + lane % 4, pitch
                ),
                16,
            )
            for lane in range(8)
        ]
        assert len(set().union(*used)) == 32
    for column, j in product(range(0, bytes_of_row // 4, 8), range(4)):
        # float32 numbers one by one: all lanes at once.
        used = [
            banks(
                index.feature_offset(index.gradient_row(lane, j), (column + lane // 4) // 4, pitch)
                + 4 * ((column + lane // 4) % 4),
                4,
            )
            for lane in LANES
        ]
        assert len(set().union(*used)) == 32


def test_every_row_is_multiplied_once(index) -> None:
    assert sorted(index.logit_row(g) for g in range(8)) == list(range(8))


def test_order_of_rows_in_the_gradient_can_be_inverted(index) -> None:
    rows = {}
    for t, j in product(range(4), range(4)):
        row = index.gradient_row(t, j)
        rows[row] = (t, j)
        assert (index.gradient_lane(row), index.gradient_slot(row)) == (t, j)
    assert sorted(rows) == list(range(16))


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("tiles", [1, 2])
def test_residuals_of_a_lane_are_apart_by_constants(index, terms, tiles) -> None:
    for row, t, slot, term in product(range(32), range(4), range(4 * tiles), range(terms)):
        first = index.residual_half(terms, tiles, row, t, 0)
        here = index.residual_half(terms, tiles, row, t + 4 * slot, term)
        assert 2 * (here - first) == index.residual_slot_bytes(terms, tiles, slot, term)


def test_packed_residuals_are_what_the_lanes_expect(index) -> None:
    terms, tiles, tile_rows = 3, 5, 32
    places = {}
    for row, cls, term in product(range(tile_rows), range(16 * tiles), range(terms)):
        places[index.residual_half(terms, tiles, row, cls, term)] = (row, cls, term)
    assert sorted(places) == list(range(terms * tiles * tile_rows * 16))
    assert 2 * len(places) == index.residual_bytes(terms, tiles, tile_rows)
    # Read back as the A operand: word w of 4 holds class g + 8 (w & 1), k-numbers 2 (w >> 1) + e.
    for step, term, tile, lane in product(range(2), range(terms), range(tiles), LANES):
        block = (step * terms + term) * tiles + tile
        for w, e in product(range(4), range(2)):
            half = ((block * 32 + lane) * 4 + w) * 2 + e
            row = 16 * step + index.gradient_row(lane % 4, 2 * (w >> 1) + e)
            assert places[half] == (row, 16 * tile + lane // 4 + 8 * (w & 1), term)


@pytest.mark.parametrize("item", ITEMS)
def test_warps_share_the_columns_of_the_gradient(index, item) -> None:
    columns = [
        index.gradient_column(warp, pair) + i
        for warp, pair, i in product(range(8), range(16), range(16))
    ]
    assert sorted(columns) == list(range(2048))
    stride = index.gradient_pair_bytes(item)
    for warp, pair, row in product(range(8), range(16), range(16)):
        first = index.gradient_column(warp, 0) * item // 16
        here = index.gradient_column(warp, pair) * item // 16
        for chunk in range(item):  # 16 columns are as many chunks as a number has bytes
            expected = index.feature_offset(row, here + chunk, 8208)
            assert expected == index.feature_offset(row, first + chunk, 8208) + pair * stride


def test_every_row_belongs_to_one_tile_of_one_slab(index) -> None:
    for rows in (1, 15, 16, 63, 64, 65, 1000, 32768, 32769, 50_000):
        slab_rows = index.few_classes_slab_rows(rows, 2048)
        assert slab_rows % 64 == 0 and slab_rows <= 2048
        for blocks, tile_rows in product((1, 3, 132), (16, 32, 64)):
            if rows > 2000 and blocks != 3:
                continue
            seen, ends = [], []
            for block in range(min(blocks, -(-rows // slab_rows))):
                for slab, row, count, last in index.tile_walk(
                    block, blocks, rows, slab_rows, tile_rows
                ):
                    assert slab % blocks == block and row // slab_rows == slab and count > 0
                    seen += range(row, row + count)
                    ends += [slab] if last else []
            assert sorted(seen) == list(range(rows))
            assert sorted(ends) == list(range(-(-rows // slab_rows)))


def test_walks_of_as_many_rows_as_there_may_be_stay_within_32_bits(index) -> None:
    rows, slab_rows, blocks = 2**30, 8192, 264
    for block in (0, blocks - 1):
        tiles = index.tile_walk(block, blocks, rows, slab_rows, 64)
        assert all(0 <= row < rows and count == 64 for _, row, count, _ in tiles)
        assert len(tiles) == len(range(block, rows // slab_rows, blocks)) * slab_rows // 64


@pytest.mark.parametrize("limit", [2048, 8192])
def test_slabs_depend_on_rows_alone(index, limit) -> None:
    for rows in (1, 64, 65, 10**4, 10**6, 528 * limit, 528 * limit + 1, 10**9):
        slab_rows = index.few_classes_slab_rows(rows, limit)
        assert 64 <= slab_rows <= limit
        if rows <= 528 * limit:
            assert -(-rows // slab_rows) <= 528


def test_tree_adds_every_strand_once(index) -> None:
    sums = {strand: [strand] for strand in range(16)}
    width = 8
    while width:
        for strand in range(16):
            partner = index.reduce_partner(strand, width)
            if partner >= 0:
                sums[strand] = sums[strand] + sums[partner]
        width //= 2
    assert sorted(sums[0]) == list(range(16))


SUPPORTED = [
    # dtype, exact, classes, dim, on an A100 too
    (1, False, 10, 512, True),
    (1, False, 10, 2048, True),
    (1, False, 16, 2048, True),
    (1, False, 32, 1024, True),
    (1, False, 80, 512, True),
    (1, False, 100, 512, False),
    (1, False, 104, 512, False),
    (1, True, 10, 512, True),
    (1, True, 10, 2048, True),
    (1, True, 64, 512, False),
    (0, True, 10, 512, True),
    (0, True, 10, 2048, False),
    (0, False, 10, 2048, False),
    (0, True, 32, 512, True),
    (2, False, 10, 2048, True),
]


@pytest.mark.parametrize("feature, exact, classes, dim, small", SUPPORTED)
def test_plans_fit(index, feature, exact, classes, dim, small) -> None:
    for limit, wanted in ((H200_SHARED, True), (A100_SHARED, small)):
        plan = index.few_classes_plan(feature, exact, classes, dim, limit)
        assert plan["ok"] == wanted, plan
        if wanted:
            assert plan["first_bytes"] <= limit and plan["second_bytes"] <= limit


@pytest.mark.parametrize(
    "feature, exact, classes, dim, together",
    [
        (1, False, 10, 512, 2),
        (2, False, 16, 512, 2),
        (1, False, 1, 8, 2),
        (1, False, 10, 513, 1),  # more registers for the sums
        (1, False, 17, 512, 1),
        (1, True, 10, 512, 1),
        (0, False, 10, 512, 1),
        (1, False, 10, 2048, 1),
    ],
)
def test_two_blocks_share_a_multiprocessor(index, feature, exact, classes, dim, together) -> None:
    plan = index.few_classes_plan(feature, exact, classes, dim, H200_SHARED)
    assert plan["ok"] and plan["together"] == together
    assert plan["narrow"] == (feature != 0 and not exact and classes <= 16 and dim <= 512)
    assert together * (plan["first_bytes"] + 1024) <= H200_SHARED + 1024
    if together == 2:
        assert plan["tile_rows"] >= 32 and plan["stages"] >= 2


def test_one_block_where_two_have_no_room(index) -> None:
    plan = index.few_classes_plan(1, False, 10, 512, A100_SHARED)
    assert plan["narrow"] and plan["together"] == 1 and plan["tile_rows"] == 64
    plan = index.few_classes_plan(1, False, 10, 256, A100_SHARED)
    assert plan["together"] == 2


def test_layout_has_no_overlap(index) -> None:
    for feature, exact, classes, dim in product(
        range(3), (False, True), (1, 10, 33, 80, 100), (1, 512)
    ):
        plan = index.few_classes_plan(feature, exact, classes, dim, H200_SHARED)
        if not plan["ok"]:
            continue
        item = 4 if feature == 0 else 2
        terms = 3 if exact else 2 if feature == 0 else 1
        rows, stages, tiles = plan["tile_rows"], plan["stages"], plan["tiles"]
        layout = index.first_layout(item, terms, tiles, classes, dim, rows, stages)
        assert layout["bytes"] == plan["first_bytes"]
        sizes = {
            "weights": index.operand_bytes(item, terms, classes, dim),
            "logits": layout["slices"] * rows * layout["logit_stride"] * 4,
            "residuals": index.residual_bytes(terms, tiles, rows),
            "norms": layout["slices"] * rows * 4,
        }
        end = stages * rows * index.row_pitch(item, dim)
        for name, size in sizes.items():
            assert end <= layout[name] and layout[name] % 16 == 0, name
            end = layout[name] + size
        assert end == layout["bytes"]
        # Sums of eight warps in the second slice of the logits, barriers behind first rows.
        assert layout["bias_sums"] == layout["logits"] + layout["slice_bytes"]
        assert layout["slices"] >= 2 and 8 * classes * 4 <= layout["slice_bytes"]
        row, pitch = index.row_bytes(item, dim), index.row_pitch(item, dim)
        assert layout["barriers"] == (row, (stages - 1) * rows * pitch + row)
        assert row % 8 == 0 and row + 8 <= pitch
        assert layout["slices"] * rows == 128 and rows == 16 << layout["split"]
        assert layout["logit_stride"] >= -(-classes // 8) * 8


def test_instantiations_cover_every_class_and_column(index) -> None:
    for classes in range(1, 113):
        tiles = index.tiles_for(classes)
        assert tiles in (1, 2, 5, 7) and 16 * tiles >= classes
        parts, own = index.parts_of(tiles), index.class_tiles_of(tiles)
        assert parts * own >= tiles > (parts - 1) * own
        # Sums of the mean gradient in the registers of a thread, of 255.
        assert own * (index.most_columns(tiles) // 64) * 4 <= 160
    assert index.tiles_for(113) == 0


@pytest.mark.parametrize(
    "classes, dim, reason",
    [(113, 8, "112 classes"), (33, 513, "512"), (17, 1025, "1024"), (3, 2049, "2048")],
)
def test_what_is_too_large_is_refused_with_a_reason(index, classes, dim, reason) -> None:
    plan = index.few_classes_plan(1, False, classes, dim, H200_SHARED)
    assert not plan["ok"] and reason in plan["reason"]
    plan = index.few_classes_plan(0, True, 80, 512, H200_SHARED)
    assert not plan["ok"] and "shared memory" in plan["reason"]
